"""Augmentation on the device, inside the training step.

Random numbers depend on the key and on the index of each image in the global batch. So the number
of devices does not change them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

_ERASE_AREA = (0.02, 1 / 3)  # fraction of the image
_ERASE_LOG_RATIO = math.log(1 / 0.3)  # of height / width, in both directions
_ERASE_ATTEMPTS = 10
_QUANTILES = 4096  # of a table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """Ranges of a random affine map. Each value is uniform in [-range, range]; 0 turns it off.

    Attributes:
      rotate: degrees.
      translate: fraction of the image's side.
      scale: log2 of the zoom; 0.1 enlarges or shrinks by at most 7%.
      shear: degrees.
    """

    rotate: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup blends each image with a partner; cutmix pastes a box of the partner into it.

    A batch has one choice of the two, and one mixing weight.

    Attributes:
      mixup: parameter a of Beta(a, a), the distribution of the image's weight; 0 turns mixup off.
        DeiT: 0.8.
      cutmix: the same for the image's share of the area; 0 turns cutmix off. DeiT: 1.
      switch: probability of cutmix if both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Normalizes pixels.

    Args:
      images: `(..., C)`, from 0 to 255.
      mean: of pixels from 0 to 1, per channel; a single value serves all channels.
      std: standard deviation, likewise.

    Returns:
      `(..., C)` float32.
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def random_affine(images: jax.Array, key: jax.Array, index: jax.Array, ranges: Affine) -> jax.Array:
    """Rotates, shears, scales and moves each image by its own random amounts.

    The interpolation is bilinear. Pixels from outside of the image are 0.

    Args:
      images: `(B, H, W, C)` pixels.
      key: random key of the step.
      index: `(B,)` index of each image in the global batch.
      ranges: largest amounts.

    Returns:
      `(B, H, W, C)` float32 pixels.
    """
    height, width = images.shape[1:3]
    center = jnp.asarray([(height - 1) / 2, (width - 1) / 2])
    sides = (jnp.arange(side, dtype=jnp.float32) for side in (height, width))
    grid = jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1) - center[None, None, :]

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        draw = jax.random.uniform(jax.random.fold_in(key, i), (5,), minval=-1.0, maxval=1.0)
        turn, lean = jnp.deg2rad(draw[0] * ranges.rotate), jnp.deg2rad(draw[1] * ranges.shear)
        rotation = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
        shear = jnp.array([[1.0, 0.0], [jnp.tan(lean), 1.0]])
        matrix = (rotation * 2 ** (draw[2] * ranges.scale)) @ shear
        move = draw[3:] * ranges.translate * jnp.asarray([height, width], jnp.float32)
        where = jnp.einsum("hwi,ji->jhw", grid, matrix) + (center + move)[:, None, None]
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, list(where), order=1)  # noqa: E731
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images.astype(jnp.float32), index)


def random_erase(
    images: jax.Array, key: jax.Array, index: jax.Array, probability: float
) -> jax.Array:
    """Fills a random rectangle of some images with normal noise.

    The area is uniform from 2% to one third of the image's. Height / width is log-uniform from 0.3
    to 1 / 0.3. The first of ten draws that is smaller than the image counts. If there is none, the
    image does not change.

    Args:
      images: `(B, H, W, C)`, normalized.
      key: random key of the step.
      index: `(B,)` index of each image in the global batch.
      probability: of erasing an image.

    Returns:
      Images of the same shape and dtype.

    Reference: Zhong et al., Random Erasing, 2020, with the ranges DeiT uses.
    """
    rows, columns = _pixels(*images.shape[1:3])

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        chance_key, box_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
        area, log_ratio, y, x = jax.random.uniform(box_key, (4, _ERASE_ATTEMPTS))
        area = _ERASE_AREA[0] + area * (_ERASE_AREA[1] - _ERASE_AREA[0])
        area = image.shape[0] * image.shape[1] * area
        ratio = jnp.exp((2.0 * log_ratio - 1.0) * _ERASE_LOG_RATIO)
        heights, widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        fits = (heights < image.shape[0]) & (widths < image.shape[1])
        first = jnp.argmax(fits)
        height, width = heights[first], widths[first]
        top = jnp.floor(y[first] * (image.shape[0] - height + 1))
        left = jnp.floor(x[first] * (image.shape[1] - width + 1))
        erased = (rows >= top) & (rows < top + height)
        erased &= (columns >= left) & (columns < left + width)
        erased &= fits[first] & (jax.random.uniform(chance_key) < probability)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)
        return jnp.where(erased[..., None], noise, image)

    return jax.vmap(one)(images, index)


def mix(
    images: jax.Array, targets: jax.Array, key: jax.Array, ranges: Mix, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Applies mixup or cutmix; the partner of image i is image B - 1 - i of the global batch.

    Args:
      images: `(B, H, W, C)`.
      targets: `(B, K)` label probabilities.
      key: random key of the step.
      ranges: at least one of mixup and cutmix is on.
      axis_name: mapped axis that the global batch is spread over.

    Returns:
      Images and targets of the same shapes. The sum of a target does not change.

    Reference: Zhang et al., mixup, 2018; Yun et al., CutMix, 2019. DeiT switches between them.
    """
    height, width = images.shape[1:3]
    switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    if ranges.mixup and ranges.cutmix:
        cuts = jax.random.uniform(switch_key) < ranges.switch
    else:
        cuts = jnp.asarray(ranges.cutmix > 0)
    share = _symmetric_beta(mixup_key, ranges.mixup or 1.0)
    # The border clips the box. So its share of the area is measured below.
    side = jnp.sqrt(1.0 - _symmetric_beta(cutmix_key, ranges.cutmix or 1.0))
    y, x = jnp.floor(jax.random.uniform(box_key, (2,)) * jnp.asarray([height, width], jnp.float32))
    half_height, half_width = jnp.floor(height * side) // 2, jnp.floor(width * side) // 2
    rows, columns = _pixels(height, width)
    inside = (abs(rows - y + 0.5) < half_height) & (abs(columns - x + 0.5) < half_width)
    own = jnp.where(cuts, 1.0 - inside.astype(jnp.float32), share)  # weight of the image, per pixel
    partners, partner_targets = _partners((images, targets), axis_name)
    mixed = own[None, ..., None] * images + (1.0 - own[None, ..., None]) * partners
    return mixed, own.mean() * targets + (1.0 - own.mean()) * partner_targets


def _symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    """Draws a scalar from Beta(alpha, alpha), by linear interpolation of its quantiles.

    `jax.random.beta` loops until it accepts a draw. On a GPU, the host waits in each iteration.
    """
    quantiles = betaincinv(alpha, alpha, np.linspace(0.0, 1.0, _QUANTILES + 1))
    place = jax.random.uniform(key) * _QUANTILES
    low = jnp.floor(place)
    below, above = jnp.asarray(quantiles, jnp.float32)[low.astype(jnp.int32) + jnp.arange(2)]
    return below + (place - low) * (above - below)


def _pixels(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the rows `(H, 1)` and columns `(1, W)` of pixels, float32."""
    rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in (height, width))
    return rows[:, None], columns[None, :]


def _partners(tree: tuple[jax.Array, ...], axis_name: str | None) -> tuple[jax.Array, ...]:
    """Reverses the global batch, and returns this device's part of the result."""
    if axis_name is not None:
        size = jax.lax.axis_size(axis_name)
        tree = jax.lax.ppermute(tree, axis_name, [(i, size - 1 - i) for i in range(size)])
    return jax.tree.map(lambda x: x[::-1], tree)
