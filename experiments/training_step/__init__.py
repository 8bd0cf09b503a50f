"""What halting adds to the training step."""
