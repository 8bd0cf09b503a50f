"""How fast removal of halted tokens is."""
