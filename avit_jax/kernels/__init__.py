"""Kernels for what XLA does poorly."""
