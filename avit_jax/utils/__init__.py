"""Errors, files, signals and pictures."""
