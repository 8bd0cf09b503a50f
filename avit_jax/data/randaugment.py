"""RandAugment as DeiT uses it (`rand-m9-mstd0.5-inc1` in timm's notation), on Pillow pictures.

Two operations a picture, drawn from fifteen with replacement, each carried out with probability one
half, at a magnitude drawn around the configured one; the greater the magnitude, the more an
operation changes ("increasing").

Reference: Cubuk et al., RandAugment, 2020; ranges of the operations as in timm, which DeiT trains
  with.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_MAX_MAGNITUDE = 10.0
_NUM_OPERATIONS = 2
_PROBABILITY = 0.5
_FILL = (124, 116, 104)  # the mean colour of ImageNet comes in from outside
_RESAMPLE = Image.Resampling.BICUBIC

# An operation takes a picture, a strength from 0 to 1, and a sign (-1 or 1).
Operation = Callable[[Image.Image, float, int], Image.Image]


def _plain(function: Callable[[Image.Image], Image.Image]) -> Operation:
    """An operation without a strength."""
    return lambda picture, strength, sign: function(picture)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """An operation that blends a picture with a plainer version of itself, or away from it."""
    return lambda picture, strength, sign: kind(picture).enhance(
        max(0.1, 1.0 + sign * 0.9 * strength)
    )


def _affine(matrix: Callable[[float, Image.Image], Sequence[float]]) -> Operation:
    """An operation that moves points of the output to points of the picture by a matrix of the
    signed strength.
    """

    def operate(picture: Image.Image, strength: float, sign: int) -> Image.Image:
        data = matrix(sign * strength, picture)
        return picture.transform(
            picture.size, Image.Transform.AFFINE, data, resample=_RESAMPLE, fillcolor=_FILL
        )

    return operate


def _rotate(picture: Image.Image, strength: float, sign: int) -> Image.Image:
    return picture.rotate(sign * 30.0 * strength, resample=_RESAMPLE, fillcolor=_FILL)


@functools.cache
def _posterize_table(bits: int) -> list[int]:
    """Keeps the upper bits; with none left, all is black (Pillow's own function refuses 0 bits)."""
    kept = 256 - (1 << (8 - bits))
    return [value & kept for value in range(256)] * 3


def _posterize(picture: Image.Image, strength: float, sign: int) -> Image.Image:
    return picture.point(_posterize_table(4 - int(4 * strength)))


def _solarize(picture: Image.Image, strength: float, sign: int) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * strength))


@functools.cache
def _solarize_add_table(amount: int) -> list[int]:
    """Brightens the darker half of the values."""
    return [min(255, value + amount) if value < 128 else value for value in range(256)] * 3


def _solarize_add(picture: Image.Image, strength: float, sign: int) -> Image.Image:
    return picture.point(_solarize_add_table(int(110 * strength)))


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
    "translate_x": _affine(
        lambda x, picture: (1, 0, 0.45 * x * picture.width, 0, 1, 0)
    ),  # up to 0.45 of the side
    "translate_y": _affine(lambda x, picture: (1, 0, 0, 0, 1, 0.45 * x * picture.height)),
}
_OPERATIONS = tuple(OPERATIONS.values())


def rand_augment(
    picture: Image.Image, rng: np.random.Generator, *, magnitude: float, deviation: float
) -> Image.Image:
    """Carries out up to two random operations.

    Args:
      picture: RGB.
      rng: all draws are taken from it.
      magnitude: mean of the magnitude, from 0 to 10; DeiT: 9.
      deviation: its standard deviation; what is drawn is cut to [0, 10]. DeiT: 0.5.

    Returns:
      An RGB picture of the same size.
    """
    for operation in rng.integers(len(_OPERATIONS), size=_NUM_OPERATIONS):
        skip, drawn, sign = (
            rng.random() >= _PROBABILITY,
            rng.normal(magnitude, deviation),
            rng.integers(2),
        )
        if not skip:
            strength = min(max(drawn, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
            picture = _OPERATIONS[operation](picture, strength, 1 if sign else -1)
    return picture
