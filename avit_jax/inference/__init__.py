"""Inference with halted tokens removed; networks exported as one file."""
