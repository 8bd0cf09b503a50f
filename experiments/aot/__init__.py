"""The training step and adaptive inference, compiled for Cloud TPUs on a machine that has none."""
