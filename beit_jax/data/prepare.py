"""Prepares images once, for machines whose cores can't keep up: smaller JPEGs, read at random.

    python -m beit_jax.data.prepare --source=folder:/data/photos --output=/data/photos_512
    python main.py --config=... --config.data.source=prepared:/data/photos_512

Every image is decoded as a run would decode it (and turned upright), its shorter side brought down
to `--max_side` where it is longer, antialiased, never up, and stored as a JPEG of quality 95, in
the source's order and with its label. Decoding a 512-pixel image takes a fraction of a photograph's
time; an image that was small stays as large as it was. What can't be decoded is left out, counted
and named.

The same command again continues where it was stopped. Files appear under their name when they are
whole, and `prepared.json`, without which nothing reads the set, appears last.
"""

import argparse
import dataclasses
import json
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

from beit_jax.config import ConfigError, RunError, SourceConfig, check
from beit_jax.data import pipeline, sources
from beit_jax.data.prepared import FORMAT, HEADER, LABELS, shard_name
from beit_jax.data.sources import Element, Source
from beit_jax.files import write_whole

SETTINGS = "preparing.json"  # there while a set is being written
NAMED = 100  # undecodable images whose names are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is prepared, and how.

    Attributes:
      source: as `config.data.source`.
      output: folder, on a disk.
      split: of a TFDS data set.
      max_side: pixels of the shorter side, at most.
      quality: of the JPEGs, 1 to 100.
      exif_orientation: turn photographs upright. What is stored has no EXIF block.
      shard_images: images of the source that go into a file.
      max_bad_share: more that can't be decoded is an error.
      workers: images at a time; 0: as many as cores.
    """

    source: str
    output: str
    split: str = "train"
    max_side: int = 512
    quality: int = 95
    exif_orientation: bool = True
    shard_images: int = 8192
    max_bad_share: float = 0.01
    workers: int = 0

    def __post_init__(self):
        check("://" not in self.output, "--output", f"{self.output!r}: must be on a disk")
        check(self.max_side >= 1, "--max_side", "must be positive")
        check(1 <= self.quality <= 100, "--quality", "must be in 1 to 100")
        check(self.shard_images >= 1, "--shard_images", "must be positive")
        check(0 <= self.max_bad_share <= 1, "--max_bad_share", "must be in [0, 1]")
        check(self.workers >= 0, "--workers", "must not be negative")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes the set, or what is left of it, and returns its header.

    Raises:
      ConfigError: the source can't be opened, or the folder holds something else.
      RunError: too many images can't be decoded.
    """
    source = sources.open_source(
        SourceConfig(
            source=config.source,
            split=config.split,
            eval_source=config.source,  # so that nothing is withheld
            exif_orientation=config.exif_orientation,
        ),
        training=True,
    )
    folder = Path(os.path.expanduser(config.output))
    settings = _settings(config, source)
    if (folder / HEADER).exists():
        header = json.loads((folder / HEADER).read_text())
        _check_same(header["settings"], settings, folder=folder)
        logging.info("%s: done already", folder)
        return header
    _check_empty_or_same(folder, settings)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2).encode())

    shards = math.ceil(len(source) / config.shard_images)
    began, done = time.perf_counter(), 0
    notes = []
    for number in range(shards):
        path = folder / shard_name(number, shards=shards)
        note = path.with_suffix(".json")
        first = number * config.shard_images
        last = min(first + config.shard_images, len(source))
        if not (path.exists() and note.exists()):  # the note is written second
            notes.append(_write_shard(source, path, first=first, last=last, config=config))
            write_whole(note, json.dumps(notes[-1]).encode())
            done += last - first
            speed = done / (time.perf_counter() - began)
            logging.info(
                "%d of %d images, %.0f images/s, %.0f s left",
                last,
                len(source),
                speed,
                (len(source) - last) / speed,
            )
        else:
            notes.append(json.loads(note.read_text()))
        bad = sum(len(each["bad"]) for each in notes)
        if bad > config.max_bad_share * last and (last >= 100 or number == shards - 1):
            raise RunError(
                f"{bad} of {last} images can't be decoded, more than --max_bad_share allows"
                f" ({config.max_bad_share:.1%}), {source.name(_bad(notes)[0])} among them"
            )

    header = {
        "format": FORMAT,
        "settings": settings,
        "images": sum(each["images"] for each in notes),
        "undecodable": len(_bad(notes)),
        "undecodable_names": [source.name(index) for index in _bad(notes)[:NAMED]],
        "classes": list(source.classes),
        "shards": [
            {
                "images": each["images"],
                "bytes": (folder / shard_name(i, shards=shards)).stat().st_size,
            }
            for i, each in enumerate(notes)
        ],
    }
    check(header["images"] > 0, "--source", f"no image of {config.source!r} can be decoded")
    if source.classes:
        labels = np.asarray([label for each in notes for label in each["labels"]], np.int32)
        temporary = folder / f"{LABELS}.tmp.npy"  # numpy adds .npy to what doesn't end so
        np.save(temporary, labels)
        temporary.replace(folder / LABELS)
    write_whole(folder / HEADER, (json.dumps(header, indent=2) + "\n").encode())
    for number in range(shards):
        (folder / shard_name(number, shards=shards)).with_suffix(".json").unlink()
    (folder / SETTINGS).unlink()
    return header


def _settings(config: PrepareConfig, source: Source) -> dict[str, Any]:
    """What decides the files' content."""
    names = ("source", "split", "max_side", "quality", "exif_orientation", "shard_images")
    return {name: getattr(config, name) for name in names} | {"source_images": len(source)}


def _check_empty_or_same(folder: Path, settings: dict[str, Any]) -> None:
    if (folder / SETTINGS).exists():
        _check_same(json.loads((folder / SETTINGS).read_text()), settings, folder=folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output: {folder} is not empty and no prepared set")


def _check_same(before: dict[str, Any], now: dict[str, Any], *, folder: Path) -> None:
    changed = [f"--{name}: was {before[name]!r}" for name in now if before[name] != now[name]]
    if changed:
        raise ConfigError(f"--output: {folder} was begun with other settings: {', '.join(changed)}")


def _bad(notes: list[dict[str, Any]]) -> list[int]:
    return [index for each in notes for index in each["bad"]]


def _write_shard(
    source: Source, path: Path, *, first: int, last: int, config: PrepareConfig
) -> dict[str, Any]:
    """Writes the images from `first` to before `last`; what is in the file, and what is not."""
    # Here and not above: only prepared sets need it.
    from array_record.python import array_record_module

    temporary = path.with_suffix(".tmp")
    # A record at a time and as it is: JPEGs don't get smaller, and every read is of one image.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    stored, labels = [], []
    for record in _encoded(source, first=first, last=last, config=config):
        writer.write(record["jpeg"])
        stored.append(int(record["index"]))
        labels.append(int(record.get("label", -1)))
    writer.close()
    temporary.replace(path)
    return {
        "images": len(stored),
        "bad": sorted(set(range(first, last)) - set(stored)),
        "labels": labels if source.classes else [],
    }


def _encoded(
    source: Source, *, first: int, last: int, config: PrepareConfig
) -> Iterator[dict[str, Any]]:
    """The images that can be decoded, in order: `index`, `jpeg` and perhaps `label`."""
    workers = config.workers or pipeline.cores()

    def encode(place: tf.Tensor, request: tf.Tensor | Element) -> Element:
        element = source.load(request)
        image = shrink(element["image"], max_side=config.max_side)
        jpeg = tf.io.encode_jpeg(image, quality=config.quality)
        label = {"label": element["label"]} if source.classes else {}
        return {"index": place, "jpeg": jpeg} | label

    places = tf.data.Dataset.range(first, last)
    if source.sequence is None:
        requests = tf.data.Dataset.zip((places, places))
    else:
        records = source.sequence(seed=None, epoch=0, shard=0, shards=1)
        requests = tf.data.Dataset.zip((places, records.skip(first)))
    encoded = requests.map(encode, num_parallel_calls=workers, deterministic=True).ignore_errors()
    encoded = encoded.prefetch(workers).with_options(pipeline.fixed_options(workers))
    return encoded.as_numpy_iterator()


def shrink(image: tf.Tensor, *, max_side: int) -> tf.Tensor:
    """The image with its shorter side at `max_side`, where it is longer; in proportion.

    Args:
      image: uint8 [h, w, 3].
      max_side: pixels.

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


def main(arguments: list[str] | None = None) -> int:
    """The command; a setting that is wrong is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(PrepareConfig):
        required = field.default is dataclasses.MISSING
        if field.type is bool:
            parser.add_argument(
                f"--{field.name}", action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            parser.add_argument(
                f"--{field.name}",
                type=field.type,
                required=required,
                default=None if required else field.default,
            )
    logging.set_verbosity(logging.INFO)
    try:
        header = prepare(PrepareConfig(**vars(parser.parse_args(arguments))))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(shard["bytes"] for shard in header["shards"])
    print(
        f"{header['images']} images, {len(header['classes'])} classes,"
        f" {len(header['shards'])} files, {size / 1e9:.2f} GB;"
        f" {header['undecodable']} could not be decoded"
    )
    for name in header["undecodable_names"]:
        print(f"  left out: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
