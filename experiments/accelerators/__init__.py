"""What one accelerator does, measured in a few minutes."""
