"""The static network against plain PyTorch."""
