"""The Transformer: attention, norms, routing, experts."""
