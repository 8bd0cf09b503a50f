"""Multiply-accumulates (MACs) of an image, from the tokens that are active in each layer.

The literature reports MACs as the "GFLOPs" of vision transformers: 1.3 G for DeiT-T, 4.6 G for
DeiT-S. The number of floating-point operations is twice that.

Only matrix products count: patch embedding, qkv, attention, projections, MLP, attention pooling and
head. With merging, the comparison of all pairs of tokens counts too. The rotation of rotary
position embeddings takes a few operations per channel and does not count.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float32, Int32

from avit_jax.core.arrays import Array

if TYPE_CHECKING:
    from avit_jax.models import vit


def is_computed(active: Bool[Array, "L B N"], readout: slice | int) -> Bool[Array, "L B N"]:
    """Returns which tokens are computed if halted tokens and finished images are removed.

    An image is finished once all tokens that are read out have halted: its logits are final.

    Args:
      active: `(L, B, N)` bool, as in `forward.Aux`.
      readout: which tokens are read out, as `AViT.readout`; a number k: the first k tokens.

    Returns:
      `(L, B, N)` bool: the token is active, and its image is not finished.
    """
    readout = readout if isinstance(readout, slice) else slice(readout)
    return active & active[:, :, readout].any(axis=-1, keepdims=True)


def layer_macs(num_tokens: ArrayLike, model: "vit.AViT", is_last: ArrayLike = False) -> Any:
    """Returns the MACs of one layer on one image, broadcast over `num_tokens` and `is_last`.

    Args:
      num_tokens: number of tokens, any shape; an array must be float, because int32 may overflow.
      model: for its sizes.
      is_last: whether it is the last layer, in which no tokens are compared.
    """
    # qkv and projection, then the MLP.
    linear = 4 * model.width**2 + (model.spec.mlp_inputs + 1) * model.width * model.mlp_width
    is_last = is_last if isinstance(is_last, bool) else jnp.asarray(is_last, jnp.float32)
    # Queries times keys and weights times values, then the comparison of tokens.
    pairs = 2 * model.width + model.similarity_dim * (1 - is_last)
    return num_tokens * (linear + pairs * num_tokens)


def patch_depth(model: "vit.AViT", active: Bool[Array, "L B N"]) -> Int32[Array, "B rows columns"]:
    """Returns the number of layers in which each patch token is computed.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool, as in `forward.Aux`.

    Returns:
      `(B, rows, columns)` int32.
    """
    computed = is_computed(active, model.readout)[:, :, model.num_prefix_tokens :]
    depth = computed.sum(axis=0, dtype=jnp.int32)
    return depth.reshape(-1, *model.grid)


def fixed_macs(model: "vit.AViT") -> float:
    """Returns the MACs of an image outside the layers: patch embedding, pooling and head.

    A float, because int32 overflows for DeiT-B at 1,024 pixels.
    """
    patches = model.num_tokens - model.num_prefix_tokens
    macs = patches * model.patch_size**2 * model.channels * model.width
    if model.pool == "map":  # keys, values and attention; then query, projection and MLP
        macs += patches * (2 * model.width**2 + 2 * model.width)
        mlp = (model.spec.mlp_inputs + 1) * model.width * model.mlp_width
        macs += 2 * model.width**2 + mlp
    num_heads = 2 if model.distilled else 1
    return float(macs + num_heads * model.width * model.num_classes)


def static_macs(model: "vit.AViT") -> float:
    """Returns the MACs of an image in the same network without halting, as a float."""
    # Without halting, no layer compares tokens.
    return fixed_macs(model) + model.depth * float(layer_macs(model.num_tokens, model, True))


def image_macs(
    model: "vit.AViT", active: Bool[Array, "L B N"], readout: slice | None = None
) -> Float32[Array, "B"]:
    """Returns the MACs of each image if halted tokens and finished images are removed.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool, as in `forward.Aux`.
      readout: which tokens are read out; None for those that the classifier reads.

    Returns:
      `(B,)` float32 MACs.
    """
    computed = is_computed(active, model.readout if readout is None else readout)
    num_tokens = computed.sum(axis=-1).astype(jnp.float32)
    is_last = (jnp.arange(model.depth) == model.depth - 1)[:, None]
    return fixed_macs(model) + layer_macs(num_tokens, model, is_last).sum(axis=0)
