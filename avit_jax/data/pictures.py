"""Encoded pictures, of anyone's making, to RGB by Pillow. All that can be wrong with one ends in `BadPicture`."""

import io
import warnings

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no other decoder of Pillow's is let near the bytes
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # of the names of such files, in small letters
_MAX_PIXELS = 89_478_485  # above, Pillow too suspects a decompression bomb
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is refused, with a sentence of ours
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
    """The picture as a viewer shows it: first frame, upright, 8 bits a channel, on white where it is transparent.

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
        return _to_rgb(_upright(picture))
    except BadPicture:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a stranger's bytes lead them to
        reason = "no JPEG, PNG, WebP, GIF or BMP picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadPicture(reason or type(error).__name__) from error


def _check_size(width: int, height: int) -> None:
    """Raises BadPicture where a picture of so many pixels would fill the memory."""
    if width * height > _MAX_PIXELS:
        raise BadPicture(f"{width} x {height} pixels are more than {_MAX_PIXELS} in all")


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
    if picture.mode.startswith("I"):  # grey values of 16 bits, which Pillow's own conversion would cut at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture)
    return picture.convert("RGB")
