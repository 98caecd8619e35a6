"""Prepares images once, for hosts whose cores can't keep up: smaller JPEGs with random access.

    python -m beit_jax.data.prepare --source=folder:/data/photos --output=/data/photos_512
    python main.py --config=... --config.data.source=prepared:/data/photos_512

Every image is decoded as a run would decode it and turned upright. A shorter side above
`--max_side` is reduced to it with antialiasing; smaller images keep their size. The result is
stored as a JPEG of quality 95, in the source's order and with its label. Decoding a 512-pixel image
takes a fraction of a full photograph's time. Images that can't be decoded are left out, counted and
named.

Running the same command again continues where it was stopped. Files get their final name once they
are complete, and `prepared.json`, without which nothing reads the set, is written last.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax import storage
from beit_jax.config import ConfigError, RunError, SourceConfig, check
from beit_jax.config.parse import shown
from beit_jax.data import pipeline, sources
from beit_jax.data.sources import Element, Source
from beit_jax.data.sources.prepared import (
    FORMAT,
    HEADER,
    LABELS,
    header_digest,
    read_header,
    shard_name,
)
from beit_jax.files import printable, write_json
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.preprocessing import MAX_PIXELS
from beit_jax.types import Json, JsonObject
from beit_jax.verbosity import verbosity

SETTINGS = "preparing.json"  # exists while a set is being written
_SAFE = "complete files are kept"
NAMED = 100  # how many undecodable images the header names


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The command's settings.

    Attributes:
      source: images to read, written as `config.data.source`.
      output: folder on a disk to write to.
      split: of a TFDS data set.
      max_side: the longest that the shorter side may be, in pixels.
      quality: of the JPEGs, 1 to 100.
      exif_orientation: turn photographs upright. The stored JPEGs have no EXIF block.
      max_pixels: of an image of the source; larger ones count as undecodable.
      shard_images: images of the source per file.
      max_bad_share: the largest share of images that may be undecodable.
      workers: images decoded in parallel; 0 for as many as cores.
    """

    source: str
    output: str
    split: str = "train"
    max_side: int = 512
    quality: int = 95
    exif_orientation: bool = True
    max_pixels: int = MAX_PIXELS
    shard_images: int = 8192
    max_bad_share: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        check("://" not in self.output, "--output", f"{self.output!r}: must be on a disk")
        check(self.max_side >= 1, "--max_side", "must be positive")
        check(1 <= self.quality <= 100, "--quality", "must be in 1 to 100")
        check(self.max_pixels >= 1, "--max_pixels", "must be positive")
        check(self.shard_images >= 1, "--shard_images", "must be positive")
        check(0 <= self.max_bad_share <= 1, "--max_bad_share", "must be in [0, 1]")
        check(self.workers >= 0, "--workers", "must not be negative")


def prepare(config: PrepareConfig) -> JsonObject:
    """Writes the set, or what is missing of it, and returns its header.

    Raises:
      ConfigError: the source can't be opened, the folder holds something else, or another command
        is writing to it.
      RunError: too many images can't be decoded.
    """
    source = sources.open_source(
        SourceConfig(
            source=config.source,
            split=config.split,
            eval_source=config.source,  # so that nothing is withheld
            exif_orientation=config.exif_orientation,
            max_pixels=config.max_pixels,
        ),
        training=True,
    )
    folder = Path(os.path.expanduser(config.output))
    with _held(folder):
        return _prepare(source, folder, config=config)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps a second command out of it, which would write the same files.

    The kernel holds the lock on the folder itself, so that it ends with the process and leaves no
    file. A network disk may have no such lock; there, the user keeps them apart.

    Raises:
      ConfigError: another command is writing to the folder, or it is none.
    """
    isnt_file = folder.is_dir() or not folder.exists()
    check(isnt_file, "--output", f"{shown(str(folder))} is a file, not a folder")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise ConfigError(
                f"--output: another command is preparing {shown(str(folder))}; wait for it, end it,"
                " or choose another folder"
            ) from None
        logging.info("%s has no locks: start no second command with this --output", folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _prepare(source: Source, folder: Path, *, config: PrepareConfig) -> JsonObject:
    """Does the work of `prepare` in a folder that is this process's own."""
    settings = _settings(config, source)
    if (folder / HEADER).exists():
        header = read_header(folder, setting="--output")
        _check_same(header.get("settings"), settings, folder=folder)
        logging.info("%s: done already", folder)
        return header
    _check_empty_or_same(folder, settings)
    write_json(folder / SETTINGS, settings)
    notes = _write_shards(source, folder, config=config)
    header = _header(source, folder, notes=notes, settings=settings)
    check(header["images"] > 0, "--source", f"no image of {config.source!r} can be decoded")
    if source.classes:
        labels = np.asarray([label for note in notes for label in note["labels"]], np.int32)
        temporary = folder / f"{LABELS}.tmp.npy"  # np.save appends .npy to any other name
        with storage.writing(folder / LABELS, needed=labels.nbytes):
            np.save(temporary, labels)
            header["labels_sha256"] = hashlib.sha256(temporary.read_bytes()).hexdigest()
            temporary.replace(folder / LABELS)
    header["sha256"] = header_digest(header)
    write_json(folder / HEADER, header)
    for number in range(len(notes)):
        (folder / shard_name(number, shards=len(notes))).with_suffix(".json").unlink()
    (folder / SETTINGS).unlink()
    return header


def _write_shards(source: Source, folder: Path, *, config: PrepareConfig) -> list[JsonObject]:
    """Writes the files that are missing, each with a note beside it; returns all notes.

    Raises:
      RunError: too many images can't be decoded.
    """
    shards = math.ceil(len(source) / config.shard_images)
    began, done = time.perf_counter(), 0
    notes: list[JsonObject] = []
    for number in range(shards):
        path = folder / shard_name(number, shards=shards)
        note = path.with_suffix(".json")
        first = number * config.shard_images
        last = min(first + config.shard_images, len(source))
        kept = _read_note(note, first=first, last=last) if path.is_file() else None
        if kept is not None:
            notes.append(kept)
        else:
            notes.append(_write_shard(source, path, first=first, last=last, config=config))
            write_json(note, notes[-1])
            done += last - first
            speed = done / (time.perf_counter() - began)
            logging.info(
                "%d of %d images, %.0f images/s, %.0f s left",
                last,
                len(source),
                speed,
                (len(source) - last) / speed,
            )
        bad = _undecodable(notes)
        if len(bad) > config.max_bad_share * last and (last >= 100 or number == shards - 1):
            raise RunError(
                f"{len(bad)} of {last} images can't be decoded, more than --max_bad_share allows"
                f" ({config.max_bad_share:.1%}), {printable(source.name(bad[0]))} among them"
            )
    return notes


def _read_note(path: Path, *, first: int, last: int) -> JsonObject | None:
    """What is noted of a file, which is written first; None where it is to be written again."""
    if not path.is_file():
        return None
    try:
        note = read_json_object(path)
        counts = [len(note["labels"]), len(note["bad"]), note["images"]]
        whole = all(type(number) is int for number in (*note["labels"], *note["bad"], counts[2]))
        whole = whole and set(range(first, last)).issuperset(note["bad"])
    except (JsonError, LookupError, TypeError):
        whole, counts = False, [0, 0, 0]
    labels, bad, images = counts
    if not whole or images + bad != last - first or labels not in (0, images):
        logging.warning("%s is damaged; that file of images is written again", path)
        return None
    return note


def _header(
    source: Source, folder: Path, *, notes: list[JsonObject], settings: JsonObject
) -> JsonObject:
    """The content of `prepared.json`."""
    bad = _undecodable(notes)
    return {
        "format": FORMAT,
        "settings": settings,
        "images": sum(note["images"] for note in notes),
        "undecodable": len(bad),
        "undecodable_names": [source.name(index) for index in bad[:NAMED]],
        "classes": list(source.classes),
        "shards": [
            {
                "images": note["images"],
                "bytes": (folder / shard_name(number, shards=len(notes))).stat().st_size,
            }
            for number, note in enumerate(notes)
        ],
    }


def _settings(config: PrepareConfig, source: Source) -> JsonObject:
    """The settings on which the files' content depends."""
    names = ("source", "split", "max_side", "quality", "exif_orientation", "shard_images")
    settings = {name: getattr(config, name) for name in names}
    return settings | {"max_pixels": config.max_pixels, "source_images": len(source)}


def _check_empty_or_same(folder: Path, settings: JsonObject) -> None:
    if (folder / SETTINGS).exists():
        _check_same(read_json_object(folder / SETTINGS), settings, folder=folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output: {folder} is not empty and no prepared set")


def _check_same(before: Json, now: JsonObject, *, folder: Path) -> None:
    before = before if isinstance(before, dict) else {}
    before = {"max_pixels": now["max_pixels"], **before}  # older sets do not say it
    changed = [
        f"--{name}: was {shown(before.get(name))}" for name in now if before.get(name) != now[name]
    ]
    if changed:
        listed = ", ".join(changed)
        raise ConfigError(f"--output: {folder} was started with other settings: {listed}")


def _undecodable(notes: list[JsonObject]) -> list[int]:
    """Indices of the images that could not be decoded."""
    return [index for note in notes for index in note["bad"]]


def _write_shard(
    source: Source, path: Path, *, first: int, last: int, config: PrepareConfig
) -> JsonObject:
    """Writes the images [first, last) of the source; returns a note of what the file holds."""
    # Here and not above: only prepared sets need this package.
    from array_record.python import array_record_module

    temporary = path.with_suffix(".tmp")
    stored, labels = [], []
    try:
        with storage.writing(path):
            # One record per group, uncompressed: JPEGs don't get smaller, and reads are of single
            # images.
            options = "group_size:1,uncompressed"
            writer = array_record_module.ArrayRecordWriter(str(temporary), options)
            for record in _encoded(source, first=first, last=last, config=config):
                writer.write(record["jpeg"])
                stored.append(int(record["index"]))
                labels.append(int(record.get("label", -1)))
            writer.close()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file takes room that the next try needs
    return {
        "images": len(stored),
        "bad": sorted(set(range(first, last)) - set(stored)),
        "labels": labels if source.classes else [],
    }


def _encoded(
    source: Source, *, first: int, last: int, config: PrepareConfig
) -> Iterator[dict[str, Any]]:
    """The images that can be decoded, in order: `index`, `jpeg` and, with classes, `label`."""
    workers = config.workers or pipeline.cores()

    def encode(index: tf.Tensor, request: tf.Tensor | Element) -> Element:
        element = source.load(request)
        image = shrink(element["image"], max_side=config.max_side)
        jpeg = tf.io.encode_jpeg(image, quality=config.quality)
        label = {"label": element["label"]} if source.classes else {}
        return {"index": index, "jpeg": jpeg} | label

    indices = tf.data.Dataset.range(first, last)
    if source.sequence is None:
        requests = tf.data.Dataset.zip((indices, indices))
    else:
        records = source.sequence(seed=None, epoch=0, shard=0, shards=1)
        requests = tf.data.Dataset.zip((indices, records.skip(first)))
    encoded = requests.map(encode, num_parallel_calls=workers, deterministic=True).ignore_errors()
    encoded = encoded.prefetch(workers).with_options(pipeline.fixed_options(workers))
    return encoded.as_numpy_iterator()


def shrink(image: tf.Tensor, *, max_side: int) -> tf.Tensor:
    """Reduces an image whose shorter side is longer than `max_side` to it, in proportion.

    Args:
      image: uint8 [h, w, 3].
      max_side: the longest that the shorter side may be, in pixels.

    Returns:
      uint8 [h', w', 3].
    """
    size = tf.shape(image)[:2]
    shorter = tf.reduce_min(size)

    def smaller() -> tf.Tensor:
        scale = max_side / tf.cast(shorter, tf.float64)
        wanted = tf.cast(tf.round(tf.cast(size, tf.float64) * scale), tf.int32)
        resized = tf.image.resize(image, wanted, method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)

    return tf.ensure_shape(tf.cond(shorter > max_side, smaller, lambda: image), [None, None, 3])


def _parser() -> argparse.ArgumentParser:
    """One flag for every field of PrepareConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(PrepareConfig):
        required = field.default is dataclasses.MISSING
        settings: dict[str, Any] = {} if required else {"default": field.default}
        if field.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = field.type
        parser.add_argument(f"--{field.name}", required=required, **settings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; an error is one line on stderr.

    2 for a wrong option or bad images; 74 for a disk that is full or can't be used, after which the
    same command goes on with the first file that is missing.

    Args:
      arguments: of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    try:
        with verbosity(logging.INFO):
            header = prepare(PrepareConfig(**vars(options)))
    except (ConfigError, RunError) as error:
        code = storage.failed(error, safe=_SAFE)
        if code is None:
            print(f"error: {error}", file=sys.stderr)
        return code or 2
    except Exception as error:
        code = storage.failed(error, safe=_SAFE)
        if code is None:
            raise
        return code
    size = sum(shard["bytes"] for shard in header["shards"])
    print(
        f"{header['images']} images, {len(header['classes'])} classes,"
        f" {len(header['shards'])} files, {size / 1e9:.2f} GB;"
        f" {header.get('undecodable')} could not be decoded"
    )
    for name in header.get("undecodable_names") or ():
        print(f"  left out: {printable(str(name))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
