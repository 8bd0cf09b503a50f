"""Host transforms: record in, uint8 image of one size out. Pictures are handled by Pillow."""

import io
import math

import numpy as np
from PIL import Image

from avit_jax.data import sources

_CROP_SCALE = (0.08, 1.0)  # share of the area, DeiT's
_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_ATTEMPTS = 10


def train(record: sources.Record, rng: np.random.Generator, *, image_size: tuple[int, int]) -> sources.Record:
    """Random resized crop and horizontal flip of an encoded picture; arrays pass as they are."""
    if isinstance(record["image"], np.ndarray):
        return _as_record(record["image"], record["label"])
    picture = _decode(record["image"])
    height, width = image_size
    box = _random_box(picture.width, picture.height, rng)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _as_record(np.asarray(picture), record["label"])


def evaluate(record: sources.Record, *, image_size: tuple[int, int], crop_ratio: float) -> sources.Record:
    """The central crop of an encoded picture, `crop_ratio` of what the resized picture would be; arrays pass as they are."""
    if isinstance(record["image"], np.ndarray):
        return _as_record(record["image"], record["label"])
    picture = _decode(record["image"])
    height, width = image_size
    scale = max(height / picture.height, width / picture.width) / crop_ratio
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return _as_record(np.asarray(resized.crop((left, top, left + width, top + height))), record["label"])


def _as_record(image: np.ndarray, label: int) -> sources.Record:
    return {"image": image, "label": np.int32(label)}


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Box (left, top, right, bottom) of random area and shape; the largest central one of an allowed shape if none fits."""
    log_ratio = np.log(_CROP_RATIO)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*_CROP_SCALE)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _CROP_RATIO[1]))
    h = min(height, round(width / _CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
