"""Weight files of other libraries, to and from our parameter tree."""

from avit_jax.weights.name_maps import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
