"""Errors, files, signals and figures."""
