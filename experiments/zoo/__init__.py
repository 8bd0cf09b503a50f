"""Writes the files of the zoo."""
