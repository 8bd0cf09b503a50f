"""Rotary position embeddings (RoPE) of DINOv3. Axes as in `vit`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from avit_jax.core import halting
from avit_jax.core.arrays import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """How queries and keys of patches rotate with the place of the patch on the grid.

    The center of a patch has two coordinates between -1 and 1, one for its row, one for its column.
    Channels i and i + K / 2 of a head form a pair. Half of the pairs rotate with the row, half with
    the column. The angle is 2 pi coordinate / period. The K / 4 periods are the powers
    `theta ** (4 j / K)`. Prefix tokens do not rotate. A token into which others merge keeps its own
    place. Training does not augment the coordinates.

    Attributes:
      theta: base of the periods.
      grid: rows and columns of patches.
      num_prefix_tokens: R.

    Reference: Simeoni et al., arXiv 2508.10104 (DINOv3); Su et al., arXiv 2104.09864 (RoPE).
    """

    theta: float
    grid: tuple[int, int]
    num_prefix_tokens: int

    def angles(self, head_width: int) -> np.ndarray:
        """Returns the angle of each pair of channels, `(N, K / 2)` float64; 0 for prefix tokens."""
        periods = self.theta ** (np.arange(head_width // 4) * 4 / head_width)
        sides = [(2 * np.arange(side) + 1) / side - 1 for side in self.grid]
        places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2, 1)
        angles = (2 * np.pi * places / periods).reshape(len(places), -1)
        return np.pad(angles, ((self.num_prefix_tokens, 0), (0, 0)))

    def turn(
        self, heads: Float[Array, "*BH n K"], index: Int[Array, "B n"] | None, axis: int
    ) -> Float[Array, "*BH n K"]:
        """Rotates queries or keys; it computes in float32 or a wider dtype.

        Args:
          heads: queries or keys: images first, channels K last, tokens and heads between them.
          index: `(B, n)` indices of the tokens in their image; None if they are all N in order.
          axis: axis of the heads, 1 or 2.

        Returns:
          The rotated `heads`, of the same shape and dtype.
        """
        angles = self.angles(heads.shape[-1])
        dtype = halting.at_least_float32(heads.dtype)
        cos, sin = (jnp.asarray(table, dtype) for table in (np.cos(angles), np.sin(angles)))
        if index is None:
            cos, sin = cos[None], sin[None]
        else:
            cos, sin = (table.at[index].get(mode="clip") for table in (cos, sin))
        cos, sin = jnp.expand_dims(cos, axis), jnp.expand_dims(sin, axis)
        a, b = jnp.split(heads.astype(dtype), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(heads.dtype)
