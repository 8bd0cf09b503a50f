"""The halting layer for Flax NNX, under its public name."""

from avit_jax.models.halting_nnx import Halting

__all__ = ["Halting"]
