"""MACs of an image if halted tokens are removed, including padding."""

import jax
import jax.numpy as jnp

from avit_jax.core.plan import Plan
from avit_jax.core.ragged import make_buckets
from avit_jax.kernels import packed
from avit_jax.models import flops, vit


def bucketed_macs(model: vit.AViT, plan: Plan, active: jax.Array) -> jax.Array:
    """Returns the MACs of all layers for each image in buckets, including padding.

    Args:
      model: for its sizes.
      plan: sizes of the buckets.
      active: `(L, B, N)` bool.

    Returns:
      `(B,)` float32.
    """
    is_last = jnp.arange(model.depth) == model.depth - 1
    padded = jax.vmap(lambda active, is_last: padded_macs(model, active, plan, is_last))
    return padded(active, is_last).sum(axis=0)


def packed_macs(model: vit.AViT, active: jax.Array) -> jax.Array:
    """Returns the MACs of all layers for each image in packed execution, including padding.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool.

    Returns:
      `(B,)` float32. The padding of the last block of rows is shared in proportion to the tokens of
      the images. The attention of an image runs in whole blocks of queries and keys.
    """
    tiles = packed.TILES

    def in_blocks(num: jax.Array, size: int) -> jax.Array:
        return jnp.ceil(num / size) * size

    num = active.sum(axis=-1).astype(jnp.float32)
    total = num.sum(axis=-1, keepdims=True)
    share = in_blocks(total, tiles.rows) / jnp.maximum(total, 1.0)
    pairs = 2.0 * model.width  # MACs of a query and a key
    linear = flops.layer_macs(1.0, model, True) - pairs
    blocks = in_blocks(num, tiles.queries) * in_blocks(num, tiles.keys)
    return (num * share * linear + pairs * blocks).sum(axis=0)


def padded_macs(
    model: vit.AViT, active: jax.Array, plan: Plan, is_last: jax.typing.ArrayLike = False
) -> jax.Array:
    """Returns the MACs of one layer for each image of a chunk, including padding.

    Args:
      model: for its sizes.
      active: `(B, N)` bool.
      plan: sizes of the buckets.
      is_last: whether it is the last layer.

    Returns:
      `(B,)` float32. The images with active tokens share the MACs of their bucket evenly, including
      the MACs of empty places. Other images get 0.
    """
    buckets = make_buckets(active, plan)
    size = buckets.image.shape[1]
    compiled = jnp.array((0, *plan.token_counts(model.num_tokens)))
    ran = compiled[jnp.searchsorted(compiled, buckets.count[:, :1])].astype(jnp.float32)
    macs = size * flops.layer_macs(ran, model, is_last)
    images = (buckets.count > 0).sum(axis=1, keepdims=True).astype(macs.dtype)
    macs = jnp.where(buckets.count > 0, macs / jnp.maximum(images, 1.0), 0.0)
    each = jnp.zeros(len(active), macs.dtype)
    return each.at[buckets.image.reshape(-1)].set(macs.reshape(-1), mode="drop")
