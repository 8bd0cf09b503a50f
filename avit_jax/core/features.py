"""Features of all places of the grid, also of halted and merged tokens.

The feature of a token is its output in the layer in which it halts. A token that has merged into
another one has the feature of that token. Axes as in `models.vit`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from avit_jax.core.arrays import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The state between two layers.

    Attributes:
      output: `(B, N, D)` output of each token in the last layer in which it was active, in the
        dtype of the tokens.
      place: `(B, N)` int32, index of the token into which each token has merged; its own index if
        it has not merged.
    """

    output: Array
    place: Array


def token_index(x: Array) -> Array:
    """Returns the index of each token of `(B, N, D)`, `(B, N)` int32."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def init(x: Array) -> Features:
    """Returns the features before the first layer, for embedded tokens `(B, N, D)`."""
    return Features(output=x, place=token_index(x))


def update(before: Features, x: Array, active: Array, target: Array | None) -> Features:
    """Returns the features after a layer.

    Args:
      before: the features before the layer.
      x: `(B, N, D)` outputs of the layer; those of halted tokens are meaningless.
      active: `(B, N)` bool, whether the token is active in the layer.
      target: `(B, N)` index of the token into which each token merges in the layer, of any dtype.
        A token that does not merge has its own index. None without merging.
    """
    place = before.place
    if target is not None:
        place = jnp.take_along_axis(target.astype(place.dtype), place, axis=1)
    return Features(output=jnp.where(active[..., None], x, before.output), place=place)


def of_all(features: Features) -> Array:
    """Returns the feature of each token, `(B, N, D)`."""
    return jnp.take_along_axis(features.output, features.place[..., None], axis=1)
