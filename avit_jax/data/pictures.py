"""Encoded pictures, of anyone's making, to RGB by Pillow. All that can be wrong with one ends in
`BadPicture`.
"""

import functools
import io
import logging
import warnings

import numpy as np
from PIL import Image

_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
)  # no other decoder of Pillow's is let near the bytes
ENDINGS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
)  # of the names of such files, in small letters
_MAX_PIXELS = 89_478_485  # above, Pillow too suspects a decompression bomb
warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # it is refused, with a sentence of ours
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # place of the byte that says how many bits a channel has
_FEW = 2**12  # a picture of 16 bits whose values all lie below may hold no more than 12
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


class BadPicture(Exception):
    """The bytes are no picture that can be used; the message says why, in a few words."""


def decode(encoded: bytes) -> Image.Image:
    """The picture as a viewer shows it: first frame, upright, 8 bits a channel, on white where it
    is transparent.

    A PNG of 16 bits a channel is divided by 256. If its values use fewer bits, it is nearly black:
    a camera of 12 bits gives 0 to 4095. A grey picture is then scaled by the number of bits that
    its chunk sBIT names. All others stay as they are, with a warning once a data set. No picture is
    scaled by its own largest value: that would change the brightness picture by picture.

    Args:
      encoded: a JPEG, PNG, WebP, GIF or BMP file.

    Returns:
      An RGB picture.

    Raises:
      BadPicture: it cannot be decoded to its end, or is larger than any honest picture.
    """
    try:
        picture = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        _check_size(*picture.size)
        picture.load()
        if picture.mode == "P" and (picture.palette is None or len(picture.palette.palette) < 3):
            raise BadPicture("its colours are numbers of a palette, which is missing")
        upright = _upright(picture)
        if picture.format == "PNG" and encoded[_PNG_DEPTH] == 16:
            upright = _of_sixteen_bits(upright, encoded)
        return _to_rgb(upright)
    except BadPicture:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a stranger's bytes lead them to
        if isinstance(error, Image.UnidentifiedImageError):
            raise BadPicture("no JPEG, PNG, WebP, GIF or BMP picture") from error
        raise BadPicture(
            (str(error).strip().splitlines() or [f"damaged ({type(error).__name__})"])[0]
        ) from error


def _check_size(width: int, height: int) -> None:
    """Raises BadPicture where a picture of so many pixels would fill the memory."""
    if width * height > _MAX_PIXELS:
        raise BadPicture(f"{width} x {height} pixels are more than {_MAX_PIXELS} in all")


def _of_sixteen_bits(picture: Image.Image, encoded: bytes) -> Image.Image:
    """A decoded PNG of 16 bits a channel: grey is scaled if it uses fewer bits; Pillow keeps the
    upper 8 bits of colours.
    """
    if not picture.mode.startswith("I"):
        largest = max(
            high
            for band, (_, high) in zip(picture.getbands(), picture.getextrema(), strict=True)
            if band != "A"
        )
        if 0 < largest < _FEW >> 8:
            _warn_of_few_bits()
        return picture
    values = np.asarray(picture)
    bits = _significant_bits(encoded)
    # By the standard such values are shifted up to 16 bits, so that the lowest bits of small ones
    # are 0.
    if bits < 16 and values.max() < 2**bits and (values % 2 ** (16 - bits)).any():
        return Image.fromarray((values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8))
    if 0 < values.max() < _FEW:
        _warn_of_few_bits()
    return picture


def _significant_bits(png: bytes) -> int:
    """Of a grey PNG of 16 bits: what its chunk sBIT says, else 16."""
    place = len(_PNG_START)
    while png[place + 4 : place + 8] not in (b"IDAT", b""):
        size = int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] == b"sBIT" and size:
            return min(max(png[place + 8], 1), 16)
        place += size + 12
    return 16


@functools.cache
def _warn_of_few_bits() -> None:
    _logger.warning(
        "a picture of 16 bits a channel has no value of %d or more, and is nearly black: if its "
        "values go up to 4095 or less, "
        "scale them to 65535 in the file, or (grey pictures) name their bits in the PNG chunk sBIT",
        _FEW,
    )


def forget_warnings() -> None:
    """Lets the warnings of this module appear again, for the next data set."""
    _warn_of_few_bits.cache_clear()


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data of a picture that is whole
        return picture
    # Not ImageOps.exif_transpose: it writes all EXIF data anew, and fails where any field is odd.
    return picture.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(
        "I"
    ):  # grey values of 16 bits, which Pillow's own conversion would cut at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture)
    return picture.convert("RGB")
