"""The pooling of SigLIP: a learned query attends to all tokens. Axes as in `vit`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from avit_jax.core.arrays import Array
from avit_jax.kernels import attention as attention_lib
from avit_jax.models import block
from avit_jax.models.layer_spec import ACTIVATIONS, LayerSpec


class AttentionPool(nn.Module):
    """Pools tokens by attention, followed by an MLP with a residual branch.

    Attributes are those of `vit.AViT`; `mlp_width` and `spec` are properties of it.

    Reference: Zhai et al., arXiv 2106.04560 (the "MAP" head).
    """

    num_heads: int
    mlp_width: int
    norm_eps: float
    dtype: Any
    spec: LayerSpec

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens `(B, M, D)` to `(B, 1, D)`."""
        batch, _, width = x.shape

        def dense(name: str, x: Array, channels: int) -> Array:
            layer = nn.Dense(channels, dtype=self.dtype, kernel_init=block.kernel_init, name=name)
            return block.per_token(layer, x)

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)

        latent = self.param("latent", nn.initializers.normal(width**-0.5), (1, 1, width))
        query = dense("q", jnp.broadcast_to(latent.astype(x.dtype), (batch, 1, width)), width)
        key, value = jnp.split(dense("kv", x, 2 * width), 2, axis=-1)
        out = attention_lib.exact(heads(query), heads(key), heads(value), None)
        x = dense("proj", out.swapaxes(1, 2).reshape(batch, 1, width), width)
        norm = block.LayerNorm(
            epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False, name="norm"
        )
        hidden = dense("fc1", norm(x), self.mlp_width * self.spec.mlp_inputs)
        return x + dense("fc2", ACTIVATIONS[self.spec.mlp](hidden), width)
