"""Image files as they are found: decoded as Pillow decodes them, or refused, never anything else.

Files are made here, whole and then damaged (cut off, one byte changed, a part of zeros). Those of
a folder are tried as well, where the environment variable BEIT_JAX_PILLOW_IMAGES names one, that of
Pillow's own test images for instance (`pip download --no-binary :all: pillow`).
"""

import collections
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from beit_jax.data import decode
from beit_jax.data.by_pillow import FORMATS as FORMATS_READ
from tests.faults.row import Row

LEVELS = 3  # of 255 that a pixel may differ: decoders of JPEG and WebP round differently
VARIABLE = "BEIT_JAX_PILLOW_IMAGES"
FORMATS: dict[str, dict] = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"quality": 80},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
}


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Decodes `count` made files and all of the folder's.

    Survived is what gives Pillow's pixels, and what is refused by the error that the pipeline
    counts. What Pillow refuses for its text alone may be read: TensorFlow leaves that out.
    """
    del folder
    compare = comparison()
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    for name, data in itertools.chain(itertools.islice(files(seed), count), given()):
        outcome = compare(data)
        outcomes[outcome.split(":")[0]] += 1
        if outcome.startswith("differs"):
            failures.append(f"{name}: {outcome}")
    tried = sum(outcomes.values())
    return Row(
        part="data",
        tried=tried,
        survived=tried - len(failures),
        failures=tuple(failures),
        note=", ".join(f"{outcome} {number}" for outcome, number in sorted(outcomes.items())),
    )


def comparison() -> Callable[[bytes], str]:
    """A function from a file's content to its outcome beside Pillow's, in words."""
    in_graph = tf.function(
        lambda data: decode.decode_image(data, exif_orientation=True),
        input_signature=[tf.TensorSpec([], tf.string)],
    )

    def compare(data: bytes) -> str:
        wanted = by_pillow(data)
        try:
            found = in_graph(tf.constant(data)).numpy()
        except tf.errors.InvalidArgumentError:
            return _refused(data) if wanted is not None else "refused by both"
        if wanted is None:
            return "read, Pillow refuses"
        if found.shape != wanted.shape:
            return f"differs: {found.shape} instead of {wanted.shape}"
        worst = int(np.abs(found.astype(int) - wanted).max())
        return "the same" if worst <= LEVELS else f"differs: by {worst} levels"

    return compare


def _refused(data: bytes) -> str:
    """Why a file is refused that Pillow reads."""
    with Image.open(io.BytesIO(data)) as image:
        listed = image.format in FORMATS_READ
    return "refused as damaged" if listed else "refused by its format"


def by_pillow(data: bytes) -> np.ndarray | None:
    """Pillow's upright first frame, RGB, of 16-bit grey the high byte; None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                sixteen = image.mode.startswith("I;16") or image.format in ("PPM", "PNG")
                upright = ImageOps.exif_transpose(image)
                if sixteen and upright.mode.startswith("I"):  # docs/data.md: the high byte
                    high = (np.asarray(upright, np.uint32) >> 8).astype(np.uint8)
                    upright = Image.fromarray(high)
                return np.asarray(upright.convert("RGB"))
    except Exception:  # whatever a plugin raises
        return None


def files(seed: int) -> Iterator[tuple[str, bytes]]:
    """Files without end: each format whole once, then damaged in a way that is drawn."""
    random = np.random.default_rng(seed)
    for number in itertools.count():
        for kind, options in FORMATS.items():
            height, width = random.integers(1, 120, 2)
            image = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
            file = io.BytesIO()
            image.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(
                file, kind, **options
            )
            data = file.getvalue()
            yield f"seed {seed}, {kind} {number}", damage(data, random) if number else data


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """The same file cut off, with another byte, with a part of zeros, or with more behind it."""
    at = int(random.integers(len(data)))
    match random.integers(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ int(random.integers(1, 256))]) + data[at + 1 :]
        case 2:
            length = min(512, len(data) - at)
            return data[:at] + bytes(length) + data[at + length :]
        case _:
            return data + data[:at]


def given() -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of the folder that the environment names."""
    folder = os.environ.get(VARIABLE)
    for path in sorted(Path(folder).rglob("*")) if folder else ():
        if path.is_file():
            yield str(path), path.read_bytes()
