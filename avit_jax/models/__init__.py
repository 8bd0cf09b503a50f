"""The vision transformer, its layer, and the halting layer for other models."""
