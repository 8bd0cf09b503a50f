"""Augmentation on the device, inside the step.

Random numbers follow from the key and the place of each image in the global batch: the same on one device or eight.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """Ranges of a random affine map, each drawn evenly from [-range, range]; 0 leaves it out.

    Attributes:
      rotate: degrees.
      translate: share of the image's side.
      scale: in octaves of 2: 0.1 enlarges or shrinks by at most 7%.
      shear: degrees.
    """

    rotate: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pixels `(..., C)` from 0 to 255, to float32 with the given mean and deviation, which are of pixels from 0 to 1."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean.reshape((1,) * (images.ndim - 1) + (-1,))) / std.reshape(
        (1,) * (images.ndim - 1) + (-1,)
    )


def random_affine(images: jax.Array, key: jax.Array, index: jax.Array, ranges: Affine) -> jax.Array:
    """Rotates, shears, scales and moves each image by its own random amounts, bilinearly; 0 comes in from outside.

    Args:
      images: `(B, H, W, C)` pixels.
      key: of the step.
      index: `(B,)` place of each image in the global batch.
      ranges: how far.

    Returns:
      `(B, H, W, C)` float32 pixels.
    """
    height, width = images.shape[1:3]
    center = jnp.asarray([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1) - center[None, None, :]

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        draw = jax.random.uniform(jax.random.fold_in(key, i), (5,), minval=-1.0, maxval=1.0)
        turn, lean = jnp.deg2rad(draw[0] * ranges.rotate), jnp.deg2rad(draw[1] * ranges.shear)
        matrix = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]) * 2 ** (draw[2] * ranges.scale)
        matrix = matrix @ jnp.array([[1.0, 0.0], [jnp.tan(lean), 1.0]])
        move = draw[3:] * ranges.translate * jnp.asarray([height, width])
        where = jnp.einsum("hwi,ji->jhw", grid, matrix) + (center + move)[:, None, None]
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, list(where), order=1)  # noqa: E731
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images.astype(jnp.float32), index)
