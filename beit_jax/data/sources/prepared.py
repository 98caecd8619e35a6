"""A prepared set on disk: JPEGs at a stored resolution in ArrayRecord files, with their labels.

    prepared.json                        read first, written last: without it there is no set
    images-00000-of-00040.array_record   one JPEG per record, in the order of the source
    labels.npy                           int32 [images], where the source has classes

`data/prepare.py` writes it. Access is random. The files must lie on a disk, since array_record 0.8
can't read gs:// (google/array_record issue 120).
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from beit_jax.config import ConfigError, check
from beit_jax.config.parse import shown
from beit_jax.data.decode import Window, decode_element
from beit_jax.data.sources.source import Element, Request, Source, select_split
from beit_jax.types import JsonObject

HEADER = "prepared.json"
LABELS = "labels.npy"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedSet:
    """A set that is open for reading.

    Attributes:
      size: number of images.
      read: a function from an index to that image's JPEG, safe to call from any thread.
      labels: int32 [size], indices into `classes`; None where images have no labels.
      classes: class names.
      header: the content of `prepared.json`.
    """

    size: int
    read: Callable[[int], bytes]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    header: JsonObject


def shard_name(number: int, *, shards: int) -> str:
    """The file name of one shard."""
    return f"images-{number:05}-of-{shards:05}.array_record"


def open_set(path: str, *, setting: str) -> PreparedSet:
    """Opens a set and checks that it is complete.

    Args:
      path: the folder.
      setting: the setting that names it, for error messages.

    Raises:
      ConfigError: there is no set, or it is incomplete.
    """
    check(
        "://" not in path,
        setting,
        f"{shown(path)}: prepared sets are read from a disk; copy it there",
    )
    folder = Path(os.path.expanduser(path))
    if not (folder / HEADER).is_file():
        raise ConfigError(
            f"{setting}: no {HEADER} in {shown(path)}: nothing was prepared there, or not to the"
            " end; python -m beit_jax.data.prepare writes it, and continues where it was stopped"
        )
    header = json.loads((folder / HEADER).read_text())
    found = header["format"]
    check(found == FORMAT, setting, f"{shown(path)} has format {found}, this code reads {FORMAT}")
    paths = []
    for number, shard in enumerate(header["shards"]):
        file = folder / shard_name(number, shards=len(header["shards"]))
        size = file.stat().st_size if file.is_file() else -1
        if size != shard["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes, not {shard['bytes']}"
            raise ConfigError(f"{setting}: {file} {found}: copy the set again, or prepare it again")
        if shard["images"]:
            paths.append(str(file))

    # Here and not above: only prepared sets need this package.
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    records = ArrayRecordDataSource(paths)
    labels = np.load(folder / LABELS) if header["classes"] else None
    counts = {"records": len(records)} | ({} if labels is None else {"labels": len(labels)})
    for content, count in counts.items():
        wanted = header["images"]
        check(count == wanted, setting, f"{shown(path)} has {count} {content} for {wanted} images")
    return PreparedSet(
        size=header["images"],
        read=lambda index: records[int(index)],
        labels=labels,
        classes=tuple(header["classes"]),
        header=header,
    )


def open_prepared(request: Request) -> Source:
    """Opens "prepared:PATH".

    Raises:
      ConfigError: there is no complete set, or the split leaves no images.
    """
    opened = open_set(request.value, setting=request.setting)
    records = select_split(opened.size, identity=str, request=request)
    table = tf.constant(records)
    labels = None if opened.labels is None else tf.constant(opened.labels[records])

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        data = tf.numpy_function(opened.read, [table[index]], tf.string, stateful=False)
        # Photographs were turned upright, where that was wanted, when the set was prepared.
        decoded = decode_element(
            tf.ensure_shape(data, []),
            window=window,
            exif_orientation=False,
            max_pixels=request.config.max_pixels,
        )
        return decoded | ({} if labels is None else {"label": labels[index]})

    return Source(
        size=len(records),
        name=lambda index: f"{request.value}, record {records[index]}",
        load=load,
        fields=("image",) if labels is None else ("image", "label"),
        classes=opened.classes,
        portable=False,
    )
