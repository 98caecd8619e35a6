"""A prepared set on disk: JPEGs at a stored resolution in ArrayRecord files, with their labels.

    prepared.json                        read first, written last: without it there is no set
    images-00000-of-00040.array_record   one JPEG per record, in the order of the source
    labels.npy                           int32 [images], where the source has classes

`data/prepare.py` writes it. Access is random. The files must lie on a disk, since array_record 0.8
can't read gs:// (google/array_record issue 120).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from beit_jax.config import ConfigError, check
from beit_jax.config.bounds import INT64
from beit_jax.config.parse import shown
from beit_jax.data.decode import Window, decode_element
from beit_jax.data.sources.source import Element, Request, Source, select_split
from beit_jax.files import open_regular
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.types import Json, JsonObject

HEADER = "prepared.json"
LABELS = "labels.npy"
FORMAT = 1
_LARGEST_NPY_HEADER = 1 << 16  # bytes


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
    header = read_header(folder, setting=setting)
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

    wanted = header["images"]
    try:
        records = ArrayRecordDataSource(paths)
        count = len(records)
    except Exception as error:  # array_record raises RuntimeError for a file that is none
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"{setting}: the images of {shown(path)} can't be read ({reason}): copy the set again,"
            " or prepare it again"
        ) from error
    check(count == wanted, setting, f"{shown(path)} has {count} records for {wanted} images")
    labels = _read_labels(folder, header, setting=setting) if header["classes"] else None
    return PreparedSet(
        size=header["images"],
        read=lambda index: records[int(index)],
        labels=labels,
        classes=tuple(header["classes"]),
        header=header,
    )


def read_header(folder: Path, *, setting: str) -> JsonObject:
    """The content of `prepared.json`, of the types that it is read as.

    Args:
      folder: of the set.
      setting: the setting that names it, for error messages.

    Raises:
      ConfigError: it is damaged, or of another format.
    """
    path = folder / HEADER
    try:
        header = read_json_object(path)
    except JsonError as error:
        raise ConfigError(f"{setting}: {error}") from None
    found = header.get("format")
    check(
        found == FORMAT,
        setting,
        f"{shown(str(folder))} has format {shown(found)}, this code reads {FORMAT}",
    )
    shards, classes = header.get("shards"), header.get("classes")
    valid = (
        _is_count(header.get("images"))
        and isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(_is_count(shard.get(name)) for shard in shards for name in ("bytes", "images"))
        and sum(shard["images"] for shard in shards) == header["images"] > 0
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
    )
    valid = valid and ("sha256" not in header or header["sha256"] == header_digest(header))
    check(valid, setting, f"{path} is damaged: copy the set again, or prepare it again")
    return header


def header_digest(header: JsonObject) -> str:
    """SHA-256 of a header's content, in which it is `sha256`; sets of older versions lack it."""
    content = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_count(value: Json) -> bool:
    return type(value) is int and 0 <= value <= INT64


def _read_labels(folder: Path, header: JsonObject, *, setting: str) -> np.ndarray:
    """The labels, int32 [images]. Raises ConfigError where they are no such thing."""
    path, images, classes = folder / LABELS, header["images"], len(header["classes"])
    try:
        with open_regular(str(path)) as file:  # a pipe has no end
            size = os.fstat(file.fileno()).st_size
            if size > 8 * images + _LARGEST_NPY_HEADER:
                raise ValueError(f"{size} bytes are more than {images} labels have")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # Mapped, since its header alone says how much memory reading it takes.
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises anything for a damaged header
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{setting}: {path} can't be read: {reason}") from None
    if header.get("labels_sha256", digest) != digest:
        raise ConfigError(f"{setting}: {path} is damaged: copy the set again, or prepare it again")
    found = getattr(labels, "shape", None)  # an .npz has none
    if found is None or len(found) != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"{setting}: {path} holds no list of labels")
    count = f"{shown(str(folder))} has {found[0]} labels for {images} images"
    check(found[0] == images, setting, count)
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"{setting}: {path} has labels beyond its {classes} classes")
    return np.array(labels, np.int32)


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
