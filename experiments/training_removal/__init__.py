"""What removal of halted tokens is worth in training."""
