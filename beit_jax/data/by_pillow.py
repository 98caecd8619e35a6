"""Decodes images with Pillow, and tells which files are better left to TensorFlow.

    image = decode_by_pillow(io.BytesIO(data), max_pixels=MAX_PIXELS, exif_orientation=True)

Pillow reads what TensorFlow's decoders can't (animated WebP, TIFF, AVIF, most kinds of BMP) or read
wrong (the first frame of a GIF, the EXIF orientation of PNG and WebP). This file imports no
TensorFlow: the features of a folder are read with it too.
"""

import functools
import importlib
import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from beit_jax.preprocessing import MAX_PIXELS

# What Pillow may read. Left out are formats that run other programs (EPS), that hold no image
# themselves, and that have no header to be recognised by (TGA).
FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000"),
    *("HEIF", "JXL"),  # of the plugins
)
# Packages that teach Pillow further formats, where they are installed: a module, and the function
# of it to call, if importing it is not enough.
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}

_PNG_START = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that say how it is turned, or that it is animated. (Text chunks do so only under
# some keywords.)
_PNG_CHUNKS = (b"eXIf", b"acTL")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_KEYWORDS = (b"Raw profile type ", b"XML:com.adobe.xmp")
# Flags of an extended WebP: an animation, or metadata that may say how it is turned.
_WEBP_ANIMATION, _WEBP_XMP, _WEBP_EXIF = 0x02, 0x04, 0x08

_lock = threading.Lock()


class TooLargeError(ValueError):
    """An image has more pixels than is allowed."""


def decode_by_pillow(
    file: BinaryIO | str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = True
) -> np.ndarray:
    """Decodes an image's first frame.

    The pixels are those of `ImageOps.exif_transpose(Image.open(file)).convert("RGB")`, except that
    16-bit grey keeps its high 8 bits, where Pillow's conversion turns everything above 255 white.
    Transparency is dropped, as that conversion does: a transparent pixel shows the colour that is
    stored under it.

    Args:
      file: an open file, or the path of one.
      max_pixels: height times width may not exceed it; compared before anything is decoded.
      exif_orientation: turn the image upright. Damaged EXIF data counts as none.

    Returns:
      uint8 `[h, w, 3]`, RGB.

    Raises:
      TooLargeError: the image has too many pixels.
      Exception: whatever Pillow raises for a damaged file, which is not only OSError.
    """
    with _lock:  # decoders run in many threads, and the first ones would import plugins at once
        formats = readable_formats()
    with Image.open(file, formats=formats) as opened:
        check_pixels(*opened.size, max_pixels=max_pixels)
        image: Image.Image = opened
        image.load()
        if exif_orientation:
            _turn_upright(image)
        # 16 bits, grey: "I;16" and, of a PPM, "I".
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PPM"):
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        # Pillow would warn that converting a palette loses its transparency.
        image.info.pop("transparency", None)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def check_pixels(width: int, height: int, *, max_pixels: int) -> None:
    """Raises TooLargeError where an image of that size has more than `max_pixels`."""
    if width * height > max_pixels:
        raise TooLargeError(f"{width} x {height} pixels are more than {max_pixels}")


def is_left_to_tensorflow(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the file is a PNG or WebP that TensorFlow decodes as `decode_by_pillow` does.

    Args:
      data: the file's content; not a JPEG, all of which are.
      max_pixels: as for `decode_by_pillow`.

    Raises:
      TooLargeError: it would be left to TensorFlow, but has too many pixels.
    """
    if data.startswith(_PNG_START):
        size = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
        plain = not any(_says_more(data, start, kind) for start, kind in _png_chunks(data))
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp_size(data)
        flags = data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0
        plain = not flags & (_WEBP_ANIMATION | _WEBP_XMP | _WEBP_EXIF)
    else:
        return False
    if plain:
        check_pixels(*size, max_pixels=max_pixels)
    return plain


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Where each chunk's content begins, and its kind."""
    position = len(_PNG_START)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield position + 8, kind
        position += 12 + length


def _says_more(data: bytes, start: int, kind: bytes) -> bool:
    """Whether a PNG's chunk may say that the image is turned or animated."""
    if kind in _PNG_TEXTS:
        return data.startswith(_PNG_KEYWORDS, start)
    return kind in _PNG_CHUNKS


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a still WebP as its header says."""
    head = data[20:30].ljust(10, b"\0")
    if data[12:16] == b"VP8X":
        width, height = head[4:7] + b"\0", head[7:10] + b"\0"
        return 1 + int.from_bytes(width, "little"), 1 + int.from_bytes(height, "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _turn_upright(image: Image.Image) -> None:
    """Turns an image as its EXIF orientation says; leaves it where the EXIF data is damaged."""
    try:
        ImageOps.exif_transpose(image, in_place=True)  # a copy would be a large one
    except Exception:  # anything, for damaged EXIF data; the pixels are decoded already
        return


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has, with the optional plugins that are installed."""
    Image.init()
    for module, register in _PLUGINS.items():
        try:
            plugin = importlib.import_module(module)
            if register:
                getattr(plugin, register)()
        except Exception:  # not installed, or not for this Pillow
            continue
    return tuple(name for name in FORMATS if name in Image.OPEN)
