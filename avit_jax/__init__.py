"""Adaptive-token vision transformers (A-ViT) in JAX and Flax."""

from avit_jax import adaptive, halting, losses, vit, weights
from avit_jax.halting import HaltingConfig
from avit_jax.vit import AViT, deit_base, deit_small, deit_tiny

__all__ = ["AViT", "HaltingConfig", "adaptive", "deit_base", "deit_small", "deit_tiny", "halting", "losses", "vit", "weights"]
