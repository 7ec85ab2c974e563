"""An image file as 8-bit colors, upright; of several frames the first, without its transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lrpet.data.cache import DataError

__all__ = ["central_square", "open_image"]
ORIENTATION = 0x0112  # the tag of Exif
UPRIGHT = {  # its value → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str) -> Image.Image:
    """Decode an image of any format to RGB, turned as its Exif orientation says.

    16-bit images keep their high bits, where Pillow alone would make white of all that is above 255.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be decoded, or its numbers have no known range (32 bits, floating point); names
            it.
    """
    try:
        with Image.open(path) as image:
            turned = _orientation(image)
            pixels = _eight_bits(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({error}); replace it or move it away") from error
    return pixels.transpose(UPRIGHT[turned]) if turned in UPRIGHT else pixels


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # Pillow has no one error for damaged Exif; the image itself may be whole
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 0 … 65535 in both
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = {"I": "32-bit", "F": "floating-point"}[image.mode]
        raise ValueError(f"{kind} numbers, of no known range: convert them to 8 or 16 bits")
    return image.convert("RGB")


def central_square(image: Image.Image, short: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``short`` pixels and cut out the central square, (size, size, 3) uint8.

    >>> central_square(Image.new("RGB", (30, 20)), 12, 10).shape
    (10, 10, 3)
    """
    scale = short / min(image.size)
    image = image.resize([max(short, round(edge * scale)) for edge in image.size], Image.Resampling.BILINEAR)
    left, top = ((edge - size) // 2 for edge in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
