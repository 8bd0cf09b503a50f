"""Finds image files, and decodes these untrusted files to RGB. Every failure raises `BadImage`."""

import errno
import functools
import io
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

# Pillow's other decoders never see the bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Of file names, in lower case.
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAX_PIXELS = 89_478_485  # above this, Pillow too suspects a decompression bomb
# Such an image is refused anyway, with our own message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # position of the byte that gives the bits per channel
_FEW = 2**12  # if all 16-bit values are below this, they may have 12 bits only
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = _TAGS = (258, 262, 339)  # of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the last two
_logger = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # EXIF
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """The bytes are not a usable image; the message gives the reason in a few words."""


def find(folder: str | os.PathLike) -> tuple[list[str], int]:
    """Returns the image files in a folder and in all folders below it.

    Links are followed, but no folder is searched twice, and none that contains `folder`. Hidden
    files and folders are left out.

    Returns:
      The paths in alphabetical order, and how many other files and links there are.

    Raises:
      OSError: a folder cannot be read.
    """
    root, seen = pathlib.Path(os.path.realpath(folder)), set()
    paths: list[str] = []
    waiting, ignored = [(os.fspath(folder), False)], 0
    while waiting:
        parent, is_below = waiting.pop()
        target = os.path.realpath(parent)
        if target in seen or (is_below and root.is_relative_to(target)):
            ignored += 1
            continue
        seen.add(target)
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name, reverse=True):
            is_hidden = entry.name.startswith(".")
            if points_to(entry.is_dir):
                waiting += [] if is_hidden else [(entry.path, True)]
            elif is_hidden or not (has_ending(entry.name) and points_to(entry.is_file)):
                ignored += 1
            else:
                paths.append(entry.path)
    return sorted(paths), ignored


def has_ending(name: str) -> bool:
    """Returns whether a file name ends as those of images do."""
    return name.lower().endswith(ENDINGS)


def points_to(kind: Callable[[], bool]) -> bool:
    """Calls `is_dir` or `is_file` of an entry; returns False for a link that leads in circles."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def decode(encoded: bytes, value_range: Sequence[float] = ()) -> Image.Image:
    """Decodes an image as a viewer shows it: first frame, upright, transparency on white.

    Grey values of more than 8 bits are scaled from `value_range` to 0 to 255. Without a range, the
    file gives it: 0 to 65535 for 16 bits, 0 to 4095 for a TIFF of 12 bits or a PNG with 12 in its
    chunk sBIT. If values of 16 bits are all below 4096, they become nearly black, and one warning
    per data set reports it. No image is scaled by its own maximum, which would change the
    brightness from image to image. Colours of 16 bits are divided by 256.

    Args:
      encoded: a JPEG, PNG, WebP, GIF, BMP or TIFF file.
      value_range: the values of black and white, such as (0, 4095); empty: as the file says.

    Returns:
      An RGB image, 8 bits per channel.

    Raises:
      BadImage: the file cannot be decoded completely, has too many pixels, or has values whose
        range is not known.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        _check_size(*image.size)
        tags = {tag: image.tag_v2.get(tag) for tag in _TAGS} if image.format == "TIFF" else {}
        image.load()
        if image.mode == "P" and (image.palette is None or len(image.palette.palette) < 3):
            raise BadImage("its colours are numbers of a palette, which is missing")
        upright = _upright(image)
        if upright.mode.startswith(("I", "F")):
            upright = _scale(upright, value_range or _own_range(upright, encoded, tags))
            if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
                upright = upright.point(lambda value: 255 - value)
        elif 16 in (tags.get(_BITS) or [encoded[_PNG_DEPTH] if image.format == "PNG" else 8]):
            _warn_of_dark_colours(upright)
        return _to_rgb(upright)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("no JPEG, PNG, WebP, GIF, BMP or TIFF image") from error
    except Exception as error:  # Pillow's decoders can raise anything on untrusted bytes
        lines = str(error).strip().splitlines() or [f"damaged ({type(error).__name__})"]
        raise BadImage(lines[0]) from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels exceed the limit of {_MAX_PIXELS}")


def _scale(image: Image.Image, value_range: Sequence[float]) -> Image.Image:
    """Maps grey values to 8 bits; those outside of the range become black or white."""
    low, high = value_range
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImage("some of its values are not finite")
    values -= low
    values *= 256 / (high - low)  # so that 16 bits keep the upper 8
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


def _own_range(image: Image.Image, encoded: bytes, tags: dict[int, Any]) -> tuple[int, int]:
    """Returns the values of black and white of a grey image of more than 8 bits."""
    values = np.asarray(image)
    bits, *_ = tags.get(_BITS) or [16]
    if bits > 16 or _UNSIGNED not in (tags.get(_SAMPLE_FORMAT) or [_UNSIGNED]):
        raise BadImage(
            "its values are signed, of 32 bits or floating-point: give the values of black and "
            "white as --config.data.range='(0,1)'"
        )
    if not tags:  # a PNG
        bits = _significant_bits(encoded)
        # A writer that follows the standard shifts values up to 16 bits, so that their lowest bits
        # are zero. Such values need no scaling.
        if values.max() >= 2**bits or not (values % 2 ** (16 - bits)).any():
            bits = 16
    if bits == 16 and 0 < values.max() < _FEW:
        _warn_of_few_bits()
    return 0, 2**bits - 1


def _warn_of_dark_colours(image: Image.Image) -> None:
    """Warns if colours of 16 bits use fewer; Pillow has cut them to the upper 8 bits."""
    bands = zip(image.getbands(), image.getextrema(), strict=True)
    if 0 < max(high for band, (_, high) in bands if band != "A") < _FEW >> 8:
        _warn_of_few_bits()


def _significant_bits(png: bytes) -> int:
    """Returns the bits per value that the chunk sBIT of a grey PNG gives, or 16."""
    start = len(_PNG_START)
    while (kind := png[start + 4 : start + 8]) not in (b"IDAT", b""):
        size = int.from_bytes(png[start : start + 4])
        if kind == b"sBIT" and size:
            return min(max(png[start + 8], 1), 16)
        start += size + 12
    return 16


@functools.cache
def _warn_of_few_bits() -> None:
    _logger.warning(
        "an image of 16 bits per channel has no value of %d or more, and is nearly black: if its "
        "white is 4095 or less, scale its values to 65535 in the file, or (grey images) set "
        "--config.data.range='(0,4095)'",
        _FEW,
    )


def reset_warnings() -> None:
    """Allows the warnings of this module to appear again, for the next data set."""
    _warn_of_few_bits.cache_clear()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data of an intact image
        return image
    # ImageOps.exif_transpose would rewrite all EXIF data, and fail if any field is invalid.
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
