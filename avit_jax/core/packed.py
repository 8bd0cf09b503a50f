"""Packs the active tokens of all images into one buffer, image after image.

The buffer has a row for every token, so its shape is fixed. The active tokens fill the first rows.
Their number is known on the device only.

This module holds the bookkeeping: which token is in which row. It knows nothing of layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from avit_jax.core.arrays import Array

_IN = "promise_in_bounds"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Which token is in which row of a buffer of T rows.

    Attributes:
      token: `(T,)` int32, index `b * N + n` of the token in each row; 0 in rows without a token.
      row: `(B, N)` int32, row of each active token; for other tokens, any row of the buffer.
      first: `(B + 1,)` int32, first row of each image; the last entry is the number of active
        tokens. Image b has the rows from `first[b]` to `first[b + 1] - 1`.
    """

    token: Array
    row: Array
    first: Array


def pack(active: Array, num_rows: int) -> Packing:
    """Gives each active token a row, in ascending order of image and token.

    Args:
      active: `(B, N)` bool.
      num_rows: T, rows of the buffer.

    Raises:
      ValueError: the buffer has fewer rows than there are tokens.
    """
    if num_rows < active.size:
        raise ValueError(
            f"a buffer of {num_rows} rows does not hold {active.size} tokens: raise num_rows."
        )
    counts = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts[:, -1], dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    row = jnp.maximum(first[:-1, None] + counts - 1, 0)
    index = jnp.arange(active.size, dtype=jnp.int32)
    # Halted tokens get unique rows out of range, which mode="drop" ignores.
    place = jnp.where(active.reshape(-1), row.reshape(-1), num_rows + index)
    token = jnp.zeros(num_rows, jnp.int32).at[place].set(index, mode="drop", unique_indices=True)
    return Packing(token=token, row=row, first=first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Tokens of a batch in one buffer.

    Attributes:
      rows: `(T, D)` the buffer. Rows without a token may hold any value, also NaN.
      row: `(B, N)` int32, row of each token; see `Packing`.
    """

    rows: Array
    row: Array

    def prefix(self, active: Array, num_prefix_tokens: int) -> Array:
        """Returns the prefix tokens `(B, R, D)`; those that are not active are 0.

        Args:
          active: `(B, N)` bool, whether the token is active and has a row.
          num_prefix_tokens: R.
        """
        few = slice(None), slice(num_prefix_tokens)
        zero = jnp.zeros((), self.rows.dtype)
        return jnp.where(active[few][..., None], self.rows.at[self.row[few]].get(mode=_IN), zero)

    def channel(self, active: Array, channel: int) -> Array:
        """Returns one channel of all tokens, `(B, N)`; 0 for those that are not active.

        Args:
          active: `(B, N)` bool, whether the token is active and has a row.
          channel: index of the channel.
        """
        zero = jnp.zeros((), self.rows.dtype)
        return jnp.where(active, self.rows.at[self.row, channel].get(mode=_IN), zero)


def buffer(x: Array, num_rows: int) -> PackedTokens:
    """Returns all tokens `(B, N, D)` in a buffer of `num_rows` rows; its other rows are 0."""
    size = x.shape[0] * x.shape[1]
    rows = jnp.pad(x.reshape(size, -1), ((0, num_rows - size), (0, 0)))
    return PackedTokens(rows=rows, row=jnp.arange(size, dtype=jnp.int32).reshape(x.shape[:2]))
