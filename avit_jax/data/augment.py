"""Augmentation on the device, inside the step.

Random numbers follow from the key and the place of each image in the global batch: the same on one
device or eight.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

_ERASE_AREA = (0.02, 1 / 3)  # share of the image
_ERASE_LOG_RATIO = math.log(1 / 0.3)  # of height over width, both ways
_ERASE_ATTEMPTS = 10


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup and cutmix: each image is blended with, or patched from, its partner; one choice and
    one share a batch.

    Attributes:
      mixup: parameter a of the Beta(a, a) that the share of the image is drawn from; 0: no mixup.
        DeiT: 0.8.
      cutmix: likewise, of the share of the area; 0: no cutmix. DeiT: 1.
      switch: probability of cutmix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pixels `(..., C)` from 0 to 255, to float32 with the given mean and deviation, which are of
    pixels from 0 to 1.
    """
    mean, std = (
        jnp.asarray(values, jnp.float32).reshape((1,) * (images.ndim - 1) + (-1,))
        for values in (mean, std)
    )
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def random_affine(images: jax.Array, key: jax.Array, index: jax.Array, ranges: Affine) -> jax.Array:
    """Rotates, shears, scales and moves each image by its own random amounts, bilinearly; 0 comes
    in from outside.

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
    places = (jnp.arange(side, dtype=jnp.float32) for side in (height, width))
    grid = jnp.stack(jnp.meshgrid(*places, indexing="ij"), axis=-1) - center[None, None, :]

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        draw = jax.random.uniform(jax.random.fold_in(key, i), (5,), minval=-1.0, maxval=1.0)
        turn, lean = jnp.deg2rad(draw[0] * ranges.rotate), jnp.deg2rad(draw[1] * ranges.shear)
        matrix = jnp.array(
            [[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]
        ) * 2 ** (draw[2] * ranges.scale)
        matrix = matrix @ jnp.array([[1.0, 0.0], [jnp.tan(lean), 1.0]])
        move = draw[3:] * ranges.translate * jnp.asarray([height, width], jnp.float32)
        where = jnp.einsum("hwi,ji->jhw", grid, matrix) + (center + move)[:, None, None]
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, list(where), order=1)  # noqa: E731
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images.astype(jnp.float32), index)


def random_erase(
    images: jax.Array, key: jax.Array, index: jax.Array, probability: float
) -> jax.Array:
    """Fills a random rectangle of some images with normal noise.

    Its area is drawn evenly from 2% to a third of the image's, its height over width evenly in the
    logarithm from 0.3 to 1 / 0.3; the first of ten draws that is smaller than the image is taken,
    and no rectangle where none is.

    Args:
      images: `(B, H, W, C)`, normalised.
      key: of the step.
      index: `(B,)` place of each image in the global batch.
      probability: that an image is erased.

    Returns:
      Images of the same shape and dtype.

    Reference: Zhong et al., Random Erasing, 2020, with the ranges DeiT uses.
    """
    rows, columns = _places(*images.shape[1:3])

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        chance_key, box_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
        area, log_ratio, y, x = jax.random.uniform(box_key, (4, _ERASE_ATTEMPTS))
        area = (
            image.shape[0]
            * image.shape[1]
            * (_ERASE_AREA[0] + area * (_ERASE_AREA[1] - _ERASE_AREA[0]))
        )
        ratio = jnp.exp((2.0 * log_ratio - 1.0) * _ERASE_LOG_RATIO)
        heights, widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        fits = (heights < image.shape[0]) & (widths < image.shape[1])
        first = jnp.argmax(fits)
        height, width = heights[first], widths[first]
        top = jnp.floor(y[first] * (image.shape[0] - height + 1))
        left = jnp.floor(x[first] * (image.shape[1] - width + 1))
        erased = (
            (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        )
        erased &= fits[first] & (jax.random.uniform(chance_key) < probability)
        return jnp.where(
            erased[..., None], jax.random.normal(noise_key, image.shape, image.dtype), image
        )

    return jax.vmap(one)(images, index)


def mix(
    images: jax.Array, targets: jax.Array, key: jax.Array, ranges: Mix, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mixup or cutmix of each image with the one as far from the end of the global batch as it is
    from the start.

    Args:
      images: `(B, H, W, C)`.
      targets: `(B, K)` label probabilities.
      key: of the step.
      ranges: at least one of mixup and cutmix is on.
      axis_name: mapped axis over which the global batch is spread.

    Returns:
      Images and targets, of the same shapes; the sum of a target stays.

    Reference: Zhang et al., mixup, 2018; Yun et al., CutMix, 2019; the switching is DeiT's.
    """
    height, width = images.shape[1:3]
    switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    if ranges.mixup and ranges.cutmix:
        cuts = jax.random.uniform(switch_key) < ranges.switch
    else:
        cuts = jnp.asarray(ranges.cutmix > 0)
    share = jax.random.beta(mixup_key, *(2 * (ranges.mixup or 1.0,)))
    # The box is cut off at the border, which is why the share of its area is counted and not drawn.
    side = jnp.sqrt(1.0 - jax.random.beta(cutmix_key, *(2 * (ranges.cutmix or 1.0,))))
    y, x = jnp.floor(jax.random.uniform(box_key, (2,)) * jnp.asarray([height, width], jnp.float32))
    half_height, half_width = jnp.floor(height * side) // 2, jnp.floor(width * side) // 2
    rows, columns = _places(height, width)
    inside = (abs(rows - y + 0.5) < half_height) & (abs(columns - x + 0.5) < half_width)
    own = jnp.where(
        cuts, 1.0 - inside.astype(jnp.float32), share
    )  # share of the image itself, by pixel
    partners, partner_targets = _partners((images, targets), axis_name)
    mixed = own[None, ..., None] * images + (1.0 - own[None, ..., None]) * partners
    return mixed, own.mean() * targets + (1.0 - own.mean()) * partner_targets


def _places(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Rows `(H, 1)` and columns `(1, W)` of pixels, float32."""
    return jnp.arange(height, dtype=jnp.float32)[:, None], jnp.arange(width, dtype=jnp.float32)[
        None, :
    ]


def _partners(tree: tuple[jax.Array, ...], axis_name: str | None) -> tuple[jax.Array, ...]:
    """The global batch in reverse order, this device's share of it."""
    if axis_name is not None:
        size = jax.lax.axis_size(axis_name)
        tree = jax.lax.ppermute(tree, axis_name, [(i, size - 1 - i) for i in range(size)])
    return jax.tree.map(lambda x: x[::-1], tree)
