"""What the pictures are of: image files, folders, or the embedded set; and points in them."""

import argparse
import os
from collections.abc import Sequence

import numpy as np

from beit_jax.config import ConfigError, check
from beit_jax.config.segment import IGNORE
from beit_jax.drawing.heat import marked
from beit_jax.features.images import RESIZES, find_images, load_images, read_image
from beit_jax.files import printable
from beit_jax.pictures.focus import labelled_images

EMBEDDED = "embedded"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the images and how they are read."""
    option = command.add_argument
    option("images", nargs="+", metavar="IMAGES", help=f"image files, folders, or {EMBEDDED}")
    option("--count", type=int, default=8, metavar="N", help="evenly spread (default: 8)")
    option("--resize", choices=RESIZES, default="crop", help="to a square (default: crop)")


def load_inputs(
    inputs: Sequence[str], *, count: int, size: int, resize: str
) -> tuple[list[str], np.ndarray]:
    """Reads the images, evenly spread over all that there are.

    Args:
      inputs: files and folders, or `EMBEDDED` alone: images that no training sees.
      count: at most so many.
      size, resize: as for `features.images.read_image`.

    Returns:
      What a person calls each image, and the images, uint8 `[b, size, size, 3]`.

    Raises:
      ConfigError: a file or folder is missing, or an image can't be read; one line.
    """
    check(count >= 1, "--count", f"{count}; must be at least 1")
    if list(inputs) == [EMBEDDED]:
        drawn, _ = labelled_images(EMBEDDED, count=max(count, 2), size=size, ignore=IGNORE)
        return [f"embedded {i + 1}" for i in range(len(drawn[:count]))], drawn[:count]
    paths: list[str] = []
    for path in inputs:
        check(os.path.exists(path), "IMAGES", f"there is no {printable(path)}")
        if os.path.isdir(path):
            paths += [os.path.join(path, name) for name in find_images(path).names]
        else:
            paths.append(path)
    check(bool(paths), "IMAGES", f"no images in {', '.join(map(printable, inputs))}")
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]
    read = load_images(
        "", chosen, load=lambda path: read_image(path, size=size, resize=resize), threads=4, ahead=4
    )
    images: list[np.ndarray] = []
    for path, image in read:
        if isinstance(image, str):
            raise ConfigError(f"IMAGES: can't read {printable(path)}: {printable(image)}")
        images.append(image)
    return [printable(os.path.basename(path)) for path in chosen], np.stack(images)


def chosen_block(number: int, *, layers: int) -> int:
    """The block that `--block` names, from 1.

    Args:
      number: from 1, or negative, from the last.
      layers: of the encoder.

    Raises:
      ConfigError: there is no such block.
    """
    check(
        number != 0 and -layers <= number <= layers,
        "--block",
        f"{number}; the encoder has blocks 1 to {layers}",
    )
    return number if number > 0 else layers + 1 + number


def point(text: str) -> tuple[float, float]:
    """Reads "X,Y", shares of the width and of the height, 0..1."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be X,Y, such as 0.5,0.5") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text}: X and Y are shares of the sides, 0 to 1")
    return x, y


def patch_at(at: tuple[float, float], *, grid: int) -> tuple[int, int]:
    """The (row, column) of the patch at a point (x, y)."""
    x, y = at
    return min(int(y * grid), grid - 1), min(int(x * grid), grid - 1)


def framed(image: np.ndarray, *, query: tuple[int, int], grid: int) -> np.ndarray:
    """The image with a frame around a patch; the frame hides one pixel of the patch on each side.

    Args:
      image: uint8 `[s, s, 3]`.
      query: the patch's (row, column).
      grid: patches along a side.
    """
    size = image.shape[0]
    side = size // grid
    top, left = (max(0, side * at - 1) for at in query)
    bottom, right = (min(size, side * (at + 1) + 1) for at in query)
    return marked(image, box=(top, left, bottom, right))
