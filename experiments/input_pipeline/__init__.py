"""The same small network with and without halting, on real digits."""
