"""Host transforms: decoded picture in, uint8 image of one size out; arrays, which have that size
already, pass as they are.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from avit_jax.data import randaugment

_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_ATTEMPTS = 10
_MAX_OBLONG = 100  # longer over shorter side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Random resized crop, horizontal flip and RandAugment.

    Attributes:
      image_size: (height, width) of the result.
      crop_scale: least and largest share of the picture's area that a crop takes; DeiT: (0.08, 1).
      flip: probability of a horizontal flip.
      magnitude: of RandAugment, from 0, which leaves it out, to 10; DeiT: 9.
      deviation: of the magnitude; DeiT: 0.5.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    magnitude: float = 0.0
    deviation: float = 0.5

    def __call__(self, picture: Image.Image | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 `(H, W, 3)` from an RGB picture; all random numbers are the generator's."""
        if isinstance(picture, np.ndarray):
            return picture
        height, width = self.image_size
        box = _random_box(picture.width, picture.height, self.crop_scale, rng)
        picture = picture.crop(box).resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.magnitude > 0:
            picture = randaugment.rand_augment(
                picture, rng, magnitude=self.magnitude, deviation=self.deviation
            )
        return np.asarray(picture)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The centre of a picture.

    Attributes:
      image_size: (height, width) of the result.
      crop_ratio: share of the resized picture's shorter side that is seen; DeiT: 0.875, 224 of 256
        pixels.
    """

    image_size: tuple[int, int]
    crop_ratio: float

    def __call__(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """uint8 `(H, W, 3)` from an RGB picture."""
        if isinstance(picture, np.ndarray):
            return picture
        picture = _without_ends(picture)
        height, width = self.image_size
        if (
            width * picture.height > height * picture.width
        ):  # relative to the crop the picture is high: its width decides
            size = (
                int(width / self.crop_ratio),
                int(int(width / self.crop_ratio) * picture.height / picture.width),
            )
        else:
            size = (
                int(int(height / self.crop_ratio) * picture.width / picture.height),
                int(height / self.crop_ratio),
            )
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return np.asarray(resized.crop((left, top, left + width, top + height)))


def _without_ends(picture: Image.Image) -> Image.Image:
    """Cuts off the ends, which no crop sees, of a strip that would fill the memory when it is
    enlarged.
    """
    width, height = (min(side, _MAX_OBLONG * min(picture.size)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return (
        picture.crop((left, top, left + width, top + height))
        if (width, height) != picture.size
        else picture
    )


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Box (left, top, right, bottom) of random area and shape; the largest central one of an
    allowed shape if none fits.
    """
    log_ratio = np.log(_CROP_RATIO)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _CROP_RATIO[1]))
    h = min(height, round(width / _CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
