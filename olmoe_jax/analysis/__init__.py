"""What the router does: traces of its choices, and what they say.

Only `recording` (by `running` and `layerwise`) runs a model; the rest are functions of traces.
"""
