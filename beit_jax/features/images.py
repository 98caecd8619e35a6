"""Image files as an encoder takes them: found in a folder, decoded by threads, resized.

found = find_images("photos")
for name, image in read_images("photos", found.names, size=224, resize="crop", threads=8):
    ...  # uint8 [224, 224, 3], or why the file could not be read
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from beit_jax.data.by_pillow import decode_by_pillow, readable_formats
from beit_jax.files import open_regular, visible_files
from beit_jax.preprocessing import MAX_PIXELS, eval_shorter_side

T = TypeVar("T")

# Image files have one of these suffixes or start with one of these byte strings. The header
# of a file with such a suffix is Pillow's to judge: a PNG named .jpg is read as the PNG it is.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")

RESIZES = ("crop", "squash")
# Images decoded ahead of the batch that is being made, for each thread.
_AHEAD = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Files under a folder.

    Attributes:
      names: of image files, relative to the folder, with "/" between folders; sorted.
      others: how many files are no images by name and header, or no regular files.
    """

    names: list[str]
    others: int


def find_images(folder: str) -> Found:
    """Lists image files at any depth, except hidden ones. Links are followed."""
    names: list[str] = []
    others: list[str] = []
    # What is no regular file (a pipe, a device, a link to nothing) is no image, whatever its name.
    for name in visible_files(folder, skipped=lambda path, reason: others.append(path)):
        is_image = name.lower().endswith(SUFFIXES) or _starts_as_image(os.path.join(folder, name))
        (names if is_image else others).append(name)
    return Found(names=sorted(names), others=len(others))


def _starts_as_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def read_image(path: str, *, size: int, resize: str) -> np.ndarray:
    """Decodes an image file, upright by its EXIF orientation, and makes it square.

    Args:
      path: of a file in one of `by_pillow.FORMATS`; of an animation, the first frame.
      size: s, side of the result in pixels.
      resize: "crop", the shorter side resized to `eval_shorter_side(size)` and the centre cut out,
        as evaluation does in training; or "squash", both sides resized to `size`, as
        transformers' BeitImageProcessor does. Both bicubic, antialiased.

    Returns:
      uint8 `[s, s, 3]`, RGB.

    Raises:
      Exception: whatever Pillow raises for a damaged file, which is not only OSError.
    """
    return squared(decode_image(path), size=size, resize=resize)


def squared(pixels: np.ndarray, *, size: int, resize: str) -> np.ndarray:
    """Makes an image, uint8 `[h, w, 3]`, square: uint8 `[size, size, 3]`, as `read_image` says."""
    image = Image.fromarray(pixels)
    box = None if resize == "squash" else _centre(image.size, size=size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def decode_image(path: str) -> np.ndarray:
    """Decodes an image file, upright by its EXIF orientation: uint8 `[h, w, 3]`, RGB.

    Raises:
      Exception: whatever Pillow raises for a damaged file, which is not only OSError.
    """
    with open_regular(path) as file:
        return decode_by_pillow(file, max_pixels=MAX_PIXELS)


def _centre(image_size: tuple[int, int], *, size: int) -> tuple[float, float, float, float]:
    """The part of the image that a centre crop of the resized image shows, in its own pixels.

    Resizing this part alone gives the pixels of the crop, however long the image's longer side is.
    Sizes are rounded as torchvision's Resize and CenterCrop do.
    """
    shorter, least = eval_shorter_side(size), min(image_size)
    resized = [side * shorter // least for side in image_size]
    corner = [round((side - size) / 2) for side in resized]
    scale = [side / new for side, new in zip(image_size, resized, strict=True)]
    left, top = (start * factor for start, factor in zip(corner, scale, strict=True))
    right, bottom = (
        min((start + size) * factor, float(side))  # a rounding error beyond the edge is refused
        for start, factor, side in zip(corner, scale, image_size, strict=True)
    )
    return left, top, right, bottom


def read_images(
    folder: str, names: Sequence[str], *, size: int, resize: str, threads: int
) -> Generator[tuple[str, np.ndarray | str], None, None]:
    """Reads images in order while threads decode the next ones; a bounded number is in memory.

    Args:
      folder: that names are relative to.
      names: as `find_images` lists them.
      size, resize: as for `read_image`.
      threads: that decode.

    Returns:
      A generator of the name, and the image, uint8 `[s, s, 3]`, or one line that says why it can't
      be read.
    """

    def load(path: str) -> np.ndarray:
        return read_image(path, size=size, resize=resize)

    return load_images(folder, names, load=load, threads=threads, ahead=_AHEAD)


def load_images(
    folder: str, names: Sequence[str], *, load: Callable[[str], T], threads: int, ahead: int
) -> Generator[tuple[str, T | str], None, None]:
    """Loads files in order while threads work on the next ones.

    Args:
      folder: that names are relative to.
      names: as `find_images` lists them.
      load: path → what is made of a file.
      threads: that call it.
      ahead: files that are loaded before they are asked for, for each thread.

    Yields:
      The name, and what `load` gave, or one line that says why the file can't be read.
    """

    def read(name: str) -> T | str:
        try:
            return load(os.path.join(folder, name))
        except Exception as error:  # decoders raise nearly anything on a damaged file
            return _reason(error)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[tuple[str, concurrent.futures.Future[T | str]]]
        waiting = collections.deque()
        try:
            for name in names:
                waiting.append((name, pool.submit(read, name)))
                if len(waiting) > threads * ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:  # where the reader has left, nothing more is decoded
            for _, future in waiting:
                future.cancel()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(readable_formats())} by its content"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
