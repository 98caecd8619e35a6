"""A prepared set on disk: JPEGs at a stored resolution in ArrayRecord files, with their labels.

    prepared.json                        read first, written last: without it there is no set
    images-00000-of-00040.array_record   a JPEG a record, in the order of the source
    labels.npy                           int32 [images], where the source has classes

`data/prepare.py` writes it, "prepared:PATH" reads it (`data/sources.py`). Access is random. The
files lie on a disk: array_record 0.8 can't read gs:// (google/array_record issue 120).
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beit_jax.config import ConfigError, check

HEADER = "prepared.json"
LABELS = "labels.npy"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedSet:
    """An opened set.

    Attributes:
      size: number of images.
      read: from an index to that image's JPEG; from any thread.
      labels: int32 [size], places in `classes`; None where there are none.
      classes: their names.
      header: what `prepared.json` says.
    """

    size: int
    read: Callable[[int], bytes]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    header: dict


def shard_name(number: int, *, shards: int) -> str:
    """The file name of one shard."""
    return f"images-{number:05}-of-{shards:05}.array_record"


def open_set(path: str, *, setting: str) -> PreparedSet:
    """Opens a set and checks that it is all there.

    Args:
      path: the folder.
      setting: what named it, for messages.

    Raises:
      ConfigError: there is no whole set.
    """
    check(
        "://" not in path, setting, f"{path!r}: prepared sets are read from a disk; copy it there"
    )
    folder = Path(os.path.expanduser(path))
    if not (folder / HEADER).is_file():
        raise ConfigError(
            f"{setting}: no {HEADER} in {path!r}: nothing was prepared there, or not to the end;"
            " python -m beit_jax.data.prepare writes it, and continues where it was stopped"
        )
    header = json.loads((folder / HEADER).read_text())
    found = header["format"]
    check(found == FORMAT, setting, f"{path!r} has format {found}, this code reads {FORMAT}")
    paths = []
    for number, shard in enumerate(header["shards"]):
        file = folder / shard_name(number, shards=len(header["shards"]))
        size = file.stat().st_size if file.is_file() else -1
        if size != shard["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes, not {shard['bytes']}"
            raise ConfigError(f"{setting}: {file} {found}: copy the set again, or prepare it again")
        if shard["images"]:
            paths.append(str(file))

    # Here and not above: only prepared sets need it.
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    records = ArrayRecordDataSource(paths)
    labels = np.load(folder / LABELS) if header["classes"] else None
    counts = {"records": len(records)} | ({} if labels is None else {"labels": len(labels)})
    for what, count in counts.items():
        wanted = header["images"]
        check(count == wanted, setting, f"{path!r} has {count} {what} for {wanted} images")
    return PreparedSet(
        size=header["images"],
        read=lambda index: records[int(index)],
        labels=labels,
        classes=tuple(header["classes"]),
        header=header,
    )
