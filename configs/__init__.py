"""Recipes: one config per file, with its command and its expected result."""
