"""A PNG of labels: which kinds of PNG are read as one, and reading those that TensorFlow can't.

    labels = read_labels(data, max_pixels=MAX_PIXELS)  # uint8 [h, w]

A label is the number that is stored for a pixel: a grey level, or an index into the palette, whose
colours mean nothing. TensorFlow's decoder would turn a palette into colours and stretch the levels
of 1, 2 and 4 bits over 0..255, as Pillow does with the latter. This file imports no TensorFlow.
"""

import io
import struct

import numpy as np
from PIL import Image

from beit_jax.data.by_pillow import check_pixels

PNG_START = b"\x89PNG\r\n\x1a\n"
# Where a PNG's header has the bits of a sample and the type of its colours.
DEPTH_AT, COLOURS_AT = 24, 25
GREY, PALETTE = 0, 3
_COLOURS = {2: "RGB colours", 4: "grey with transparency", 6: "RGB colours with transparency"}


class LabelMapError(ValueError):
    """A file can't be a map of labels. The message is one line, and says what it is instead."""


def read_labels(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Reads a label map: an 8-bit grey or palette PNG, or one of 1, 2 or 4 bits.

    Args:
      data: the file's content.
      max_pixels: height times width may not exceed it; compared before anything is decoded.

    Returns:
      uint8 [h, w], the labels as they are stored. An EXIF orientation is not looked at, as in mmseg
      (`LoadAnnotations`).

    Raises:
      LabelMapError: the file is no PNG, or one whose pixels are no labels.
      TooLargeError: it has too many pixels.
      Exception: whatever Pillow raises for a damaged file, which is not only OSError.
    """
    width, height, depth, colours = _header(data)
    check_pixels(width, height, max_pixels=max_pixels)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
        opened.load()
        labels = np.asarray(opened, np.uint8)
    if colours == GREY and depth in (2, 4):
        labels = labels // (255 // (2**depth - 1))
    return labels


def _header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, bits and colours; raises LabelMapError where these can't be labels."""
    if not data.startswith(PNG_START) or len(data) <= COLOURS_AT:
        raise LabelMapError("is no PNG")
    width, height, depth, colours = struct.unpack_from(">IIBB", data, 16)
    if depth == 16:
        raise LabelMapError("has 16 bits, and a label has 8")
    if colours not in (GREY, PALETTE):
        raise LabelMapError(f"has {_COLOURS.get(colours, 'colours')}, not one label for each pixel")
    return width, height, depth, colours
