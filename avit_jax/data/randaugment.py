"""RandAugment as DeiT uses it (`rand-m9-mstd0.5-inc1` in timm's notation), on Pillow images.

Each image gets two of fifteen operations, drawn with replacement. Each is applied with probability
one half, at a random magnitude. A greater magnitude changes the image more ("increasing").

Reference: Cubuk et al., RandAugment, 2020; the ranges of the operations are those of timm.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_MAX_MAGNITUDE = 10.0
_NUM_OPERATIONS = 2
_PROBABILITY = 0.5
_FILL = (124, 116, 104)  # ImageNet's mean colour, for pixels from outside of the image
_RESAMPLE = Image.Resampling.BICUBIC

# An operation maps an image, a strength from 0 to 1, and a sign (-1 or 1) to an image.
Operation = Callable[[Image.Image, float, int], Image.Image]


def _plain(function: Callable[[Image.Image], Image.Image]) -> Operation:
    """Returns an operation that ignores the strength."""
    return lambda image, strength, sign: function(image)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Returns an operation that weakens or amplifies a property of an image."""
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * strength))


def _affine(matrix: Callable[[float, Image.Image], Sequence[float]]) -> Operation:
    """Returns an affine operation; `matrix` maps (signed strength, image) to its coefficients."""

    def operate(image: Image.Image, strength: float, sign: int) -> Image.Image:
        data = matrix(sign * strength, image)
        return image.transform(
            image.size, Image.Transform.AFFINE, data, resample=_RESAMPLE, fillcolor=_FILL
        )

    return operate


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.rotate(sign * 30.0 * strength, resample=_RESAMPLE, fillcolor=_FILL)


@functools.cache
def _posterize_table(bits: int) -> list[int]:
    """Returns a table that keeps the upper bits; 0 bits, which Pillow refuses, give black."""
    kept = 256 - (1 << (8 - bits))
    return [value & kept for value in range(256)] * 3


def _posterize(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.point(_posterize_table(4 - int(4 * strength)))


def _solarize(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * strength))


@functools.cache
def _solarize_add_table(amount: int) -> list[int]:
    """Returns a table that brightens the darker half of the values."""
    return [min(255, value + amount) if value < 128 else value for value in range(256)] * 3


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.point(_solarize_add_table(int(110 * strength)))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _plain(ImageOps.autocontrast),
    "equalize": _plain(ImageOps.equalize),
    "invert": _plain(ImageOps.invert),
    "rotate": _rotate,  # up to 30 degrees
    "posterize": _posterize,  # 4 to 0 bits
    "solarize": _solarize,  # threshold 256 to 0
    "solarize_add": _solarize_add,  # up to 110
    "color": _enhance(ImageEnhance.Color),  # factor 0.1 to 1.9
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda x, _: (1, 0.3 * x, 0, 0, 1, 0)),  # tangent up to 0.3
    "shear_y": _affine(lambda x, _: (1, 0, 0, 0.3 * x, 1, 0)),
    # Up to 0.45 of the side.
    "translate_x": _affine(lambda x, image: (1, 0, 0.45 * x * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda x, image: (1, 0, 0, 0, 1, 0.45 * x * image.height)),
}
_OPERATIONS = tuple(OPERATIONS.values())


def rand_augment(
    image: Image.Image, rng: np.random.Generator, *, magnitude: float, deviation: float
) -> Image.Image:
    """Applies up to two random operations.

    Args:
      image: RGB.
      rng: source of all random numbers.
      magnitude: mean magnitude, from 0 to 10; DeiT: 9.
      deviation: standard deviation of the magnitude, which is clipped to [0, 10]. DeiT: 0.5.

    Returns:
      An RGB image of the same size.
    """
    for i in rng.integers(len(_OPERATIONS), size=_NUM_OPERATIONS):
        applies = rng.random() < _PROBABILITY
        drawn, sign = rng.normal(magnitude, deviation), rng.integers(2)
        if applies:
            strength = min(max(drawn, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
            image = _OPERATIONS[i](image, strength, 1 if sign else -1)
    return image
