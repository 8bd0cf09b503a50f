"""Decodes image files, which are untrusted input, to RGB. Every failure raises `BadImage`."""

import functools
import io
import logging
import warnings

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's other decoders never see the bytes
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # of file names, in lower case
_MAX_PIXELS = 89_478_485  # above this, Pillow too suspects a decompression bomb
# Such an image is refused anyway, with our own message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # position of the byte that gives the bits per channel
_FEW = 2**12  # if all 16-bit values are below this, they may have 12 bits only
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


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image as a viewer shows it: first frame, upright, transparency on white.

    A PNG of 16 bits per channel is divided by 256. If its values use fewer bits, it becomes nearly
    black: a 12-bit camera gives 0 to 4095. If such an image is grey and has a chunk sBIT, it is
    scaled by the number of bits in sBIT. Other such images stay nearly black, and one warning per
    data set reports them. No image is scaled by its own maximum, which would change the brightness
    from image to image.

    Args:
      encoded: a JPEG, PNG, WebP, GIF or BMP file.

    Returns:
      An RGB image, 8 bits per channel.

    Raises:
      BadImage: the file cannot be decoded completely, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        _check_size(*image.size)
        image.load()
        if image.mode == "P" and (image.palette is None or len(image.palette.palette) < 3):
            raise BadImage("its colours are numbers of a palette, which is missing")
        upright = _upright(image)
        if image.format == "PNG" and encoded[_PNG_DEPTH] == 16:
            upright = _scale_16_bits(upright, encoded)
        return _to_rgb(upright)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("no JPEG, PNG, WebP, GIF or BMP image") from error
    except Exception as error:  # Pillow's decoders can raise anything on untrusted bytes
        lines = str(error).strip().splitlines() or [f"damaged ({type(error).__name__})"]
        raise BadImage(lines[0]) from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels exceed the limit of {_MAX_PIXELS}")


def _scale_16_bits(image: Image.Image, encoded: bytes) -> Image.Image:
    """Scales a decoded grey PNG of 16 bits if it uses fewer; Pillow cuts colours to 8 bits."""
    if not image.mode.startswith("I"):
        bands = zip(image.getbands(), image.getextrema(), strict=True)
        if 0 < max(high for band, (_, high) in bands if band != "A") < _FEW >> 8:
            _warn_of_few_bits()
        return image
    values = np.asarray(image)
    bits = _significant_bits(encoded)
    # A writer that follows the standard shifts values up to 16 bits, so that their lowest bits are
    # zero. Such values need no scaling.
    if bits < 16 and values.max() < 2**bits and (values % 2 ** (16 - bits)).any():
        return Image.fromarray((values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8))
    if 0 < values.max() < _FEW:
        _warn_of_few_bits()
    return image


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
        "white is 4095 or less, scale its values to 65535 in the file, or (grey images) put the "
        "number of bits into the PNG chunk sBIT",
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
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey values at 255
        values = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
