"""A killed run ends where an undisturbed one does."""
