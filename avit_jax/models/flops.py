"""Multiply-accumulates (MACs) an image really costs, from the depths of its own tokens.

The literature's "GFLOPs" of vision transformers are MACs (DeiT-T 1.3 G, DeiT-S 4.6 G), half the
floating-point operations.
Counted are the matrix products: patch embedding, qkv, attention, projections, MLP and head, and,
where halted tokens merge, the comparing of all pairs. Norms, softmax and GELU are not.
"""

import jax
import jax.numpy as jnp

from avit_jax.models import vit


def computing(active: jax.Array, num_readout: int) -> jax.Array:
    """Which tokens have to compute once halted tokens are removed.

    Args:
      active: `(L, B, N)` bool, as in `vit.Aux`.
      num_readout: R, read-out tokens at the front.

    Returns:
      `(L, B, N)` bool: active, in an image that has a read-out token left. Once its read-out tokens
      have halted, the logits of an image are final, and its other tokens may stop too.
    """
    return active & active[:, :, :num_readout].any(axis=-1, keepdims=True)


def layer_macs(
    num_tokens: jax.typing.ArrayLike, model: vit.AViT, is_last: jax.typing.ArrayLike = False
) -> jax.typing.ArrayLike:
    """MACs of one layer of a model on one image with `num_tokens` tokens, any shape.

    With comparing them, where they merge: in all layers but the last.
    """
    linear = (
        4 * model.width**2 + 2 * model.width * model.mlp_width
    )  # qkv and projection, then the MLP
    is_last = is_last if isinstance(is_last, bool) else jnp.asarray(is_last, jnp.float32)
    pairs = 2 * model.width + model.compared * (
        1 - is_last
    )  # queries times keys, and weights times values
    return num_tokens * (linear + pairs * num_tokens)


def patch_depth(model: vit.AViT, active: jax.Array) -> jax.Array:
    """Layers that each patch token really computes in.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool, as in `vit.Aux`.

    Returns:
      `(B, rows, columns)` int32.
    """
    depth = computing(active, model.num_readout).sum(axis=0)[:, model.num_readout :]
    return depth.reshape(-1, *model.grid)


def fixed_macs(model: vit.AViT) -> float:
    """MACs of an image outside the layers: patch embedding and head; a float: those of DeiT-B at
    1,024 pixels overflow.
    """
    patches = model.num_tokens - model.num_readout
    macs = patches * model.patch_size**2 * model.channels * model.width
    return float(macs + model.num_readout * model.width * model.num_classes)


def static_macs(model: vit.AViT) -> float:
    """MACs of an image in the same network without halting; a float, for the same reason."""
    return fixed_macs(model) + float(
        model.depth * layer_macs(model.num_tokens, model.clone(halting=None, removal=None))
    )


def image_macs(model: vit.AViT, active: jax.Array) -> jax.Array:
    """MACs of each image when halted tokens, and all tokens of finished images, are removed.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool, as in `vit.Aux`.

    Returns:
      `(B,)` float32 MACs.
    """
    num_tokens = computing(active, model.num_readout).sum(axis=-1).astype(jnp.float32)
    is_last = (jnp.arange(model.depth) == model.depth - 1)[:, None]
    return fixed_macs(model) + layer_macs(num_tokens, model, is_last).sum(axis=0)
