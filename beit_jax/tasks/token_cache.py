"""Token ids on disk: with `config.data.augmentation_cycle` the tokenizer sees every view once.

A step's batch then holds the same views as the batch one cycle earlier
(`pipeline.training_batches`), on the same host and in the same order. So ids are stored by step, in
row `step mod rows` of a file on each host's own disk. The file is verified before it is trusted:

- A JSON file beside it records what the ids depend on. Where it is missing or differs, the file is
  started anew.
- A row has a checksum, and a fingerprint of every image that its ids belong to. A row that is
  missing, damaged or of other images (one was unreadable the first time) is computed again.

A killed run, a lost disk or another number of hosts therefore cost time and nothing else.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import jax
import numpy as np
from absl import logging

from beit_jax import storage
from beit_jax.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    TokenizerConfig,
    check,
    to_dict,
)
from beit_jax.config.differences import differences
from beit_jax.distributed import cluster
from beit_jax.files import write_json
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.functional import flatten
from beit_jax.types import JsonObject, Params

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

FORMAT = 1
VOCABULARY = 1 << 16  # ids that fit in two bytes
# A row starts with a mark that it was written, and the checksum of its number and content.
ROW_HEADER = struct.Struct("<II")
WRITTEN = 0x746F6B31
FINGERPRINT_SIDE = 16  # pixels of view 1 that a fingerprint covers, along either side

# Settings of the data that do not change the images the tokenizer is given. All others may.
IRRELEVANT = frozenset(
    {
        "eval_source",  # which images are withheld is seen in the source's names
        "eval_split",
        "mask",
        "max_bad_share",
        "normalization",
        "prefetch",
        "service",
        "token_cache",
        "workers",
    }
)
NAMED = 1000  # images whose names are compared


class TokenCache:
    """The rows of ids of one host, from `open_cache`. Threads may share it.

    Attributes:
      rows: batches in a cycle.
    """

    def __init__(self, file: BinaryIO, *, rows: int, images: int, tokens: int):
        """Takes an open file with room for `rows` of `images` × `tokens` ids."""
        self.rows = rows
        self._file = file
        self._row = np.dtype(
            [("fingerprints", "<u4", (images,)), ("ids", "<u2", (images, tokens))], align=False
        )
        self._failed = False
        self._reported = -1

    def read(self, step: int, *, images: np.ndarray) -> np.ndarray | None:
        """Reads the ids of a step's batch.

        Args:
          step: of the run.
          images: the batch's first view, uint8 `[b, s, s, 3]`.

        Returns:
          Ids, uint16 `[b, tokens]`; None where they are missing or fail the checks.
        """
        row, size = step % self.rows, ROW_HEADER.size + self._row.itemsize
        try:
            stored = os.pread(self._file.fileno(), size, row * size)
        except OSError as error:
            logging.error("token cache: row %d can't be read: %s", row, error)
            return None
        if len(stored) < size or not any(stored):  # never written
            return None
        mark, checksum = ROW_HEADER.unpack_from(stored)
        content = stored[ROW_HEADER.size :]
        if (mark, checksum) != (WRITTEN, _checksum(row, content)):
            self._report("token cache: row %d is damaged; its images are tokenised again", row)
            return None
        found = np.frombuffer(content, self._row)[0]
        other = int((found["fingerprints"] != fingerprints(images)).sum())
        if other:
            self._report(
                "token cache: of row %d, %d of %d images are not those of a cycle before; it is"
                " tokenised again",
                row,
                other,
                len(images),
            )
            return None
        return found["ids"].astype(np.uint16)

    def _report(self, message: str, row: int, *rest: int) -> None:
        if row != self._reported:  # a row may be read twice, see `known_tokens`
            logging.error(message, row, *rest)
        self._reported = row

    def write(self, step: int, *, images: np.ndarray, ids: np.ndarray) -> None:
        """Stores the ids, uint16 `[b, tokens]`, of a step's batch; see `read`.

        A failing disk is logged, and the row is computed again in the next cycle.
        """
        row = step % self.rows
        values = np.zeros((), self._row)
        values["fingerprints"], values["ids"] = fingerprints(images), ids
        content = values.tobytes()
        stored = ROW_HEADER.pack(WRITTEN, _checksum(row, content)) + content
        try:
            # Not through mapped memory, where a full disk would kill the process.
            if os.pwrite(self._file.fileno(), stored, row * len(stored)) < len(stored):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failed:
                logging.error("token cache: row %d can't be written: %s", row, error)
            self._failed = True


def fingerprints(images: np.ndarray) -> np.ndarray:
    """Checksums of some pixels of every image: uint8 `[b, s, s, 3]` → uint32 `[b]`."""
    stride = max(1, images.shape[1] // FINGERPRINT_SIDE)
    sampled = np.ascontiguousarray(images[:, stride // 2 :: stride, stride // 2 :: stride])
    return np.array([zlib.crc32(pixels) for pixels in sampled], np.uint32)


def _checksum(row: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(row.to_bytes(8, "little")))


def folder(config: DataConfig, *, workdir: str) -> str:
    """The folder for token ids; "" where none are kept.

    Raises:
      ConfigError: the run's directory is not on a local disk and no other folder is named.
    """
    if not config.augmentation_cycle:
        return ""
    check(
        bool(config.token_cache) or "://" not in workdir,
        "config.data.token_cache",
        f"token ids need a local disk, which {workdir} is not: name a folder on every host's"
        " disk, or set config.data.augmentation_cycle to 0",
    )
    return config.token_cache or f"{workdir}/token_cache"


@contextlib.contextmanager
def open_cache(
    folder: str,
    *,
    facts: JsonObject,
    rows: int,
    images: int,
    tokens: int,
    shard: int = 0,
    shards: int = 1,
) -> Iterator[TokenCache]:
    """Opens this host's file, or starts it anew where it was written for other facts.

    Args:
      folder: on a local disk; created where it is missing.
      facts: everything that ids depend on, from `cache_facts`.
      rows: batches in a cycle.
      images: images of a batch on this host.
      tokens: tokens of an image.
      shard: the index of this host.
      shards: how many hosts there are.

    Raises:
      ConfigError: another run has the file open, or the folder is unusable.
      StorageError: its disk is full or read-only.
    """
    facts = facts | {"format": FORMAT, "rows": rows, "images": images, "tokens": tokens}
    facts |= {"shard": shard, "shards": shards}
    name = f"{shard:05d}-of-{shards:05d}"
    path = pathlib.Path(folder) / f"{name}.tokens"
    record = path.with_suffix(".json")
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"config.data.token_cache: another run is using {path}; give each run its own"
            ) from error
        _check_own(path, record)
        cache = TokenCache(file, rows=rows, images=images, tokens=tokens)
        size = rows * (ROW_HEADER.size + 4 * images + 2 * images * tokens)
        different = _differences(record, facts)
        if not different and path.stat().st_size != size:
            different = "its size"
        if different:
            if path.stat().st_size:
                logging.warning("token cache: %s IS STARTED ANEW; different: %s", path, different)
            # In this order, so that old ids never lie beside a new record.
            record.unlink(missing_ok=True)
            file.truncate(0)
            file.truncate(size)
            write_json(record, facts)
        _log_space(path, rows=rows, size=size)
        yield cache


def _open(path: pathlib.Path) -> BinaryIO:
    """The file for reading and writing, made where it is missing; errors are `open_cache`'s."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        for one in (path, path.with_suffix(".json")):
            if one.exists() and not one.is_file():  # a pipe has no size, a folder can't be replaced
                raise OSError(errno.EINVAL, "not a regular file", str(one))
        return path.open("r+b", buffering=0)
    except OSError as error:
        fault = storage.explain(error, path=path)
        if fault is not None and fault.number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise fault from error
        raise ConfigError(f"config.data.token_cache: {error}") from error


def _check_own(path: pathlib.Path, record: pathlib.Path) -> None:
    """Raises ConfigError where a file of somebody else's has a name that the cache would replace.

    The file of ids is known by its record, or by the mark of its first row, which is 0 until that
    is written. A record that can't be read belongs to a file of ids that has begun.
    """
    has_ids = path.stat().st_size > 0
    try:
        own = {"format", "rows"} <= read_json_object(record).keys()
        others_record = not own
    except JsonError:
        own, others_record = False, record.exists() and not has_ids
    with path.open("rb") as file:
        known_start = file.read(4) in (bytes(4), struct.pack("<I", WRITTEN))
    if others_record or (has_ids and not own and not known_start):
        foreign = record if others_record else path
        raise ConfigError(
            f"config.data.token_cache: {foreign} is no file of token ids; move it away, or name"
            " another folder"
        )


def _log_space(path: pathlib.Path, *, rows: int, size: int) -> None:
    """Logs the size of the file, and a warning where its disk has no room for it."""
    missing = size - 512 * path.stat().st_blocks  # the file has holes
    free = shutil.disk_usage(path.parent).free
    logging.info(
        "token cache: %s, %d batches, %.3g GB, %.3g GB free on its disk",
        path,
        rows,
        size / 1e9,
        free / 1e9,
    )
    if missing > free:
        logging.warning(
            "token cache: %s needs %.3g GB more and its disk has %.3g; what does not fit is"
            " tokenised in every cycle (config.data.token_cache)",
            path,
            missing / 1e9,
            free / 1e9,
        )


def open_run_cache(
    folder: str,
    *,
    data: DataConfig,
    run: RunConfig,
    tokenizer: TokenizerConfig,
    params: Params,
    source: "Source",
) -> contextlib.AbstractContextManager[TokenCache]:
    """Opens this host's file for a run with `config.data.augmentation_cycle`.

    Args:
      folder: from `folder`.
      data: the images and their views.
      run: the seed and the batch.
      tokenizer: its settings.
      params: the weights that encoding needs.
      source: the training images.

    Raises:
      ConfigError: the folder is unusable, another run has the file open, or a batch is larger than
        the data set.
    """
    # Imported here because `data` imports TensorFlow, which a step does not need.
    from beit_jax.data import pipeline

    hosts = jax.process_count()
    steps = pipeline.steps_per_epoch(source, batch_size=run.batch_size, shards=hosts)
    check(steps > 0, "config.run.batch_size", f"{run.batch_size} is more than all images")
    rows = data.augmentation_cycle * steps
    if run.steps <= rows:
        logging.warning(
            "config.data.augmentation_cycle: a cycle is %d steps and the run ends at %d: no token"
            " is used twice",
            rows,
            run.steps,
        )
    return open_cache(
        folder,
        facts=cache_facts(data, run=run, tokenizer=tokenizer, params=params, source=source),
        rows=rows,
        images=run.batch_size // hosts,
        tokens=tokenizer.grid**2,
        shard=jax.process_index(),
        shards=hosts,
    )


def _differences(record: pathlib.Path, facts: JsonObject) -> str:
    """The names of facts that differ from the record's; "" where none does."""
    try:
        found = read_json_object(record)
    except JsonError:
        return "no record of what it is for"
    return ", ".join(differences({"recorded": found, "needed": facts}))


def cache_facts(
    data: DataConfig,
    *,
    run: RunConfig,
    tokenizer: TokenizerConfig,
    params: Params,
    source: "Source",
) -> JsonObject:
    """Everything that token ids depend on.

    Of the images, this records their number and the names of a thousand; a row's fingerprints
    detect changed pixels.

    Args:
      data: the images and their views.
      run: the seed and the batch.
      tokenizer: its settings.
      params: the weights that encoding needs.
      source: the training images.
    """
    settings = {name: value for name, value in to_dict(data).items() if name not in IRRELEVANT}
    names = hashlib.sha256()
    for index in range(0, len(source), max(1, len(source) // NAMED)):
        names.update(source.name(index).encode() + b"\0")
    weights = hashlib.sha256()
    for name, leaf in flatten(params).items():
        weights.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        weights.update(np.ascontiguousarray(leaf).data)
    package = pathlib.Path(__file__).parent.parent
    versions = cluster.library_versions()
    return {
        "seed": run.seed,
        "batch_size": run.batch_size,
        "source_size": len(source),
        "source_names": names.hexdigest(),
        "data": settings,
        "tokenizer": {
            "kind": tokenizer.kind,
            "image_size": tokenizer.image_size,
            "dtype": compute_dtype(tokenizer).name,
        },
        "weights": weights.hexdigest(),
        # Another device or version may round differently.
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: versions.get(name) for name in ("jax", "tensorflow")},
        "code": [cluster.code_version(package / part) for part in ("data", "tokenizers")],
    }
