"""Host transforms: map a decoded image to a uint8 array of one size and number of channels.

Arrays already have that size; only their channels change.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from avit_jax.data import randaugment

_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_ATTEMPTS = 10
_MAX_ASPECT = 100  # longer over shorter side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Random resized crop, horizontal flip and RandAugment.

    Attributes:
      image_size: (height, width) of the result.
      crop_scale: least and largest fraction of the image's area in a crop; DeiT: (0.08, 1).
      flip: probability of a horizontal flip.
      magnitude: of RandAugment, from 0 (off) to 10; DeiT: 9.
      deviation: of the magnitude; DeiT: 0.5.
      channels: of the result: 1 for grey, 3 for RGB.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    magnitude: float = 0.0
    deviation: float = 0.5
    channels: int = 3

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 `(H, W, channels)` from an RGB image; `rng` gives all random numbers."""
        if isinstance(image, np.ndarray):
            return _with_channels(image, self.channels)
        height, width = self.image_size
        box = _random_box(image.width, image.height, self.crop_scale, rng)
        image = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.magnitude > 0:
            image = randaugment.rand_augment(
                image, rng, magnitude=self.magnitude, deviation=self.deviation
            )
        return _with_channels(np.asarray(image), self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Resize and centre crop.

    Attributes:
      image_size: (height, width) of the result.
      crop_ratio: visible fraction of the resized image's shorter side; DeiT: 0.875, 224 of 256
        pixels.
      channels: of the result: 1 for grey, 3 for RGB.
    """

    image_size: tuple[int, int]
    crop_ratio: float
    channels: int = 3

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Returns uint8 `(H, W, channels)` from an RGB image."""
        if isinstance(image, np.ndarray):
            return _with_channels(image, self.channels)
        image = _without_ends(image)
        height, width = self.image_size
        if width * image.height > height * image.width:  # the width limits the crop
            size = int(width / self.crop_ratio)
            size = (size, int(size * image.height / image.width))
        else:
            size = int(height / self.crop_ratio)
            size = (int(size * image.width / image.height), size)
        image = _center(image.resize(size, Image.Resampling.BICUBIC), width, height)
        return _with_channels(np.asarray(image), self.channels)


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Converts grey pixels `(H, W, 1)` to RGB, or RGB ones `(H, W, 3)` to grey (ITU-R 601)."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return np.repeat(pixels, channels, axis=-1)


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _without_ends(image: Image.Image) -> Image.Image:
    """Crops the ends of an extremely long image, which would exceed the memory when enlarged."""
    width, height = (min(side, _MAX_ASPECT * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns a (left, top, right, bottom) box of random area and aspect ratio.

    If no attempt fits into the image, the box is the largest central one of an allowed ratio.
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
