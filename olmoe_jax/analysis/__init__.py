"""What the router does: traces of its choices, and what they say. Only `recording` runs a model."""
