"""The halting rule, merging and token removal: pure JAX, without Flax and without the
configuration.
"""
