"""What several tests make use of."""

import io

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """An encoded picture of the given pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
