"""Accuracy against compute: A-ViT and its rivals from one parent, in the same number of steps."""
