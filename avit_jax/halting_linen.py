"""The halting layer for Flax Linen, under its public name."""

from avit_jax.models.halting_linen import Halting

__all__ = ["Halting"]
