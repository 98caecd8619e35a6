"""What the pictures are of: image files, folders, a config's held-out images; points in them."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from beit_jax import config_file
from beit_jax.config import ConfigError, DataConfig, SourceConfig, check
from beit_jax.data import quiet_import
from beit_jax.drawing.heat import marked
from beit_jax.features.images import RESIZES, decode_image, find_images, load_images, squared
from beit_jax.files import printable
from beit_jax.types import Json

EMBEDDED = "embedded"
_HELD_OUT = 512  # of the embedded set, as the quickstart does
SQUARE = "square"  # the largest square in the middle, as pre-training sees held-out images


def add_options(command: argparse.ArgumentParser, *, count: int = 8) -> None:
    """Adds the images, how many of them (`count` by default) and how they are read."""
    option = command.add_argument
    option("images", nargs="*", metavar="IMAGES", help=f"image files, folders, or {EMBEDDED}")
    add_config(command, "whose held-out images are shown, in place of IMAGES")
    option(
        "--count",
        type=int,
        default=count,
        metavar="N",
        help=f"images, evenly spread (default: {count})",
    )
    option(
        "--resize",
        choices=(*RESIZES, SQUARE),
        default="",
        help=f"to a square (default: crop for files, {SQUARE} for a config and {EMBEDDED})",
    )


def add_config(command: argparse.ArgumentParser, what: str) -> None:
    """Adds --config; the overrides that follow it are in `overrides` (`command.parsed`)."""
    command.add_argument(
        "--config",
        default="",
        metavar="FILE",
        help=f"a config file, {what}; --config.key=value overrides a setting",
    )


def config_of(options: argparse.Namespace) -> tuple[dict[str, Json], Json]:
    """The job of --config, as settings and parsed; of the quickstart, its pre-training.

    Raises:
      ConfigError: there is no such file or setting, or a value is wrong; one line.
    """
    check(bool(options.config), "--config", "is missing; try --config=configs/quickstart.py")
    values = config_file.load([f"--config={options.config}", *options.overrides]).values
    from beit_jax import jobs  # needs what only training installs, as config_file has checked

    job = jobs.parse_job(values)
    if "data" not in values and "pretrain" in values:
        return values["pretrain"], job.pretrain
    return values, job


def read_inputs(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the images one after the other, evenly spread over all that there are.

    Args:
      options: of `add_options`.

    Yields:
      What a person calls the image, and the image as it is, uint8 `[h, w, 3]`.

    Raises:
      ConfigError: a file or folder is missing, an image can't be read, or there are none; one line.
    """
    check(options.count >= 1, "--count", f"{options.count}; must be at least 1")
    check(
        bool(options.images) != bool(options.config),
        "IMAGES",
        f"give image files, folders or {EMBEDDED}, or else --config=FILE",
    )
    if options.config:
        _, job = config_of(options)
        yield from held_out(job.data, count=options.count)
    elif options.images == [EMBEDDED]:
        yield from held_out(DataConfig(source=EMBEDDED, holdout=_HELD_OUT), count=options.count)
    else:
        yield from _files(options.images, count=options.count)


def square_of(image: np.ndarray, *, size: int, options: argparse.Namespace) -> np.ndarray:
    """An image, uint8 `[h, w, 3]`, as --resize makes it: uint8 `[size, size, 3]`."""
    from_config = bool(options.config) or options.images == [EMBEDDED]
    resize = options.resize or (SQUARE if from_config else RESIZES[0])
    if resize == SQUARE:
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image, resize = image[top : top + side, left : left + side], "squash"
    return squared(image, size=size, resize=resize)


def load_inputs(options: argparse.Namespace, *, size: int) -> tuple[list[str], np.ndarray]:
    """The images of `read_inputs` as squares: their names, and uint8 `[b, size, size, 3]`."""
    found = [
        (name, square_of(image, size=size, options=options)) for name, image in read_inputs(options)
    ]
    names, images = zip(*found, strict=True)
    return list(names), np.stack(images)


def held_out(config: SourceConfig, *, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Held-out images of a config's data, evenly spread; as `read_inputs` yields them."""
    quiet_import.tensorflow()
    try:
        import tensorflow as tf

        from beit_jax.data.label_maps import sample
        from beit_jax.data.sources import open_source
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--config: needs {error.name}, which is not installed: pip install 'beit-jax[train]'"
        ) from None
    source = open_source(config, training=False)
    seen = 0
    for index, request in sample(source, count=min(count, len(source))):
        try:
            image = source.load(request)["image"].numpy()
        except tf.errors.OpError:
            continue  # the data command names such files; here one image less does no harm
        seen += 1
        name = printable(os.path.basename(source.name(index)))
        # The embedded set's own numbers have thirteen digits.
        yield f"held-out image {seen}" if config.source.startswith(EMBEDDED) else name, image
    check(seen > 0, "--config", "none of its held-out images could be read")


def _files(inputs: Sequence[str], *, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Image files and those in folders, evenly spread."""
    paths: list[str] = []
    for path in inputs:
        check(os.path.exists(path), "IMAGES", f"there is no {printable(path)}")
        if os.path.isdir(path):
            paths += [os.path.join(path, name) for name in find_images(path).names]
        else:
            paths.append(path)
    check(bool(paths), "IMAGES", f"no images in {', '.join(map(printable, inputs))}")
    count = min(count, len(paths))
    named = set(inputs)
    readable = 0
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]
    # Few are decoded ahead: photographs are large.
    for path, image in load_images("", chosen, load=decode_image, threads=2, ahead=2):
        if isinstance(image, str):
            said = f"can't read {printable(path)}: {printable(image)}"
            if path in named:
                raise ConfigError(f"IMAGES: {said}")
            # A folder may hold anything; one file of it does not stop the others.
            print(f"warning: {said}", file=sys.stderr)
            continue
        readable += 1
        yield printable(os.path.basename(path)), image
    check(readable > 0, "IMAGES", f"none of {len(chosen)} images could be read")


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
