"""Token ids on disk: with `config.data.augmentation_cycle` the tokenizer sees each view once.

A step's batch then holds the same views as that of a cycle before (`pipeline.training_batches`), on
the same host at the same places, so ids are kept by step: row `step mod rows` of one file on each
host's own disk. The file is trusted only so far as it can be checked:

- A JSON file beside it names what ids depend on. Where that is missing or says something else, the
  file is started anew.
- A row has a checksum, and a fingerprint of each image that its ids belong to. A row that is not
  there, is damaged or is of other images (one could not be read, the first time) is made again.

So a killed run, a lost disk or another number of hosts cost time and nothing else.

    with open_cache(folder, facts=facts, rows=rows, images=local_batch, tokens=196) as cache:
        named = name_tokens(full, lean=lean, cache=cache, encode=local_encoder(tokenizer, params))
        batch = next(named.training(0))
        batch["token_ids"]  # uint16 [local_batch, 196]; there is no token_image
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
from beit_jax.files import write_whole
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.functional import Params, flatten
from beit_jax.preprocessing import JITTER_FIELDS
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training import loop
from beit_jax.training.device_jitter import jitter_batch
from beit_jax.training.state import Batch

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

FORMAT = 1
VOCABULARY = 1 << 16  # what two bytes can name
# Before a row's contents: a mark that it was written, and the checksum of its number and contents.
ROW_HEADER = struct.Struct("<II")
WRITTEN = 0x746F6B31
FINGERPRINT_SIDE = 16  # pixels of view 1 that are looked at, along each side

# Settings of the data that make no difference to what the tokenizer is given. All others may.
IRRELEVANT = frozenset(
    {
        "eval_source",  # which images are withheld shows in the source's names
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
NAMED = 1000  # images whose names are looked at


class TokenCache:
    """One host's rows of ids, from `open_cache`. Threads may share it.

    Attributes:
      rows: batches in a cycle.
    """

    def __init__(self, file: BinaryIO, *, rows: int, images: int, tokens: int):
        """An open file, and what it has room for: `rows` of `images` × `tokens` ids."""
        self.rows = rows
        self._file = file
        self._row = np.dtype(
            [("fingerprints", "<u4", (images,)), ("ids", "<u2", (images, tokens))], align=False
        )
        self._failed = False
        self._reported = -1

    def read(self, step: int, *, images: np.ndarray) -> np.ndarray | None:
        """What is known of a step's batch.

        Args:
          step: of the run.
          images: the batch's first view, uint8 `[b, s, s, 3]`.

        Returns:
          ids, uint16 `[b, tokens]`; None where they are not known or not to be trusted.
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
        if row != self._reported:  # it is looked at twice, see `name_tokens`
            logging.error(message, row, *rest)
        self._reported = row

    def write(self, step: int, *, images: np.ndarray, ids: np.ndarray) -> None:
        """Keeps the ids, uint16 `[b, tokens]`, of a step's batch; see `read`.

        A disk that fails is logged, and the row made again in the next cycle.
        """
        row = step % self.rows
        values = np.zeros((), self._row)
        values["fingerprints"], values["ids"] = fingerprints(images), ids
        content = values.tobytes()
        stored = ROW_HEADER.pack(WRITTEN, _checksum(row, content)) + content
        try:
            # Not through mapped memory: there, a full disk ends the process.
            os.pwrite(self._file.fileno(), stored, row * len(stored))
        except OSError as error:
            if not self._failed:
                logging.error("token cache: row %d can't be written: %s", row, error)
            self._failed = True


def fingerprints(images: np.ndarray) -> np.ndarray:
    """A checksum of some pixels of each image: uint8 `[b, s, s, 3]` → uint32 `[b]`."""
    stride = max(1, images.shape[1] // FINGERPRINT_SIDE)
    some = np.ascontiguousarray(images[:, stride // 2 :: stride, stride // 2 :: stride])
    return np.array([zlib.crc32(each) for each in some], np.uint32)


def _checksum(row: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(row.to_bytes(8, "little")))


def folder(config: DataConfig, *, workdir: str) -> str:
    """Where the ids are kept; "" where none are.

    Raises:
      ConfigError: the run's directory is not on a local disk and no other folder is named.
    """
    if not config.augmentation_cycle:
        return ""
    check(
        bool(config.token_cache) or "://" not in workdir,
        "config.data.token_cache",
        f"token ids are kept on a local disk, which {workdir} is not: name a folder on each host's"
        " disk, or set config.data.augmentation_cycle to 0",
    )
    return config.token_cache or f"{workdir}/token_cache"


@contextlib.contextmanager
def open_cache(
    folder: str,
    *,
    facts: dict[str, Any],
    rows: int,
    images: int,
    tokens: int,
    shard: int = 0,
    shards: int = 1,
) -> Iterator[TokenCache]:
    """Opens this host's file, or starts it anew where it is not for these facts.

    Args:
      folder: on a local disk; it is made.
      facts: JSON; all that ids depend on, see `cache_facts`.
      rows: batches in a cycle.
      images: of a batch, on this host.
      tokens: of an image.
      shard, shards: which host this is of how many.

    Raises:
      ConfigError: another run has the file open, or the folder can't be used.
    """
    facts = facts | {"format": FORMAT, "rows": rows, "images": images, "tokens": tokens}
    facts |= {"shard": shard, "shards": shards}
    name = f"{shard:05d}-of-{shards:05d}"
    path = pathlib.Path(folder) / f"{name}.tokens"
    record = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = path.open("r+b", buffering=0)
    except OSError as error:
        raise ConfigError(f"config.data.token_cache: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"config.data.token_cache: another run is using {path}; give each run its own"
            ) from error
        cache = TokenCache(file, rows=rows, images=images, tokens=tokens)
        size = rows * (ROW_HEADER.size + 4 * images + 2 * images * tokens)
        different = _differences(record, facts)
        if not different and path.stat().st_size != size:
            different = "its size"
        if different:
            if path.stat().st_size:
                logging.warning("token cache: %s IS STARTED ANEW; different: %s", path, different)
            # In this order: at no time do old ids lie beside a new record.
            record.unlink(missing_ok=True)
            file.truncate(0)
            file.truncate(size)
            write_whole(record, (json.dumps(facts, indent=2) + "\n").encode())
        missing = size - 512 * path.stat().st_blocks  # the file has holes
        free = shutil.disk_usage(path.parent).free
        logging.info(
            "token cache: %s, %d batches, %.3g GB, %.3g of them free on its disk",
            path,
            rows,
            size / 1e9,
            free / 1e9,
        )
        if missing > free:
            logging.warning(
                "token cache: %s needs %.3g GB more, its disk has %.3g; what does not fit is"
                " tokenised in every cycle (config.data.token_cache)",
                path,
                missing / 1e9,
                free / 1e9,
            )
        yield cache


def _differences(record: pathlib.Path, facts: dict[str, Any]) -> str:
    """Which facts differ from the record's; "" where none does."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return "no record of what it is for"
    if not isinstance(found, dict):
        return "no record of what it is for"
    return ", ".join(differences({"recorded": found, "needed": facts}))


def cache_facts(
    data: DataConfig,
    *,
    run: RunConfig,
    tokenizer: TokenizerConfig,
    params: Params,
    source: "Source",
) -> dict[str, Any]:
    """All that token ids depend on, as plain JSON.

    Of the images only their number and the names of a thousand are looked at; that their pixels are
    still the same is what a row's fingerprints are for.

    Args:
      data: the images and their views.
      run: the seed and the batch.
      tokenizer: its settings.
      params: what encoding needs of its weights.
      source: the training images.
    """
    settings = {name: value for name, value in to_dict(data).items() if name not in IRRELEVANT}
    names = hashlib.sha256()
    for index in range(0, len(source), max(1, len(source) // NAMED)):
        names.update(source.name(index).encode() + b"\0")
    weights = hashlib.sha256()
    for name, leaf in flatten(params).items():
        weights.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        weights.update(np.ascontiguousarray(leaf))
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
        # These may round otherwise.
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: versions.get(name) for name in ("jax", "tensorflow")},
        "code": [cluster.code_version(package / part) for part in ("data", "tokenizers")],
    }


def local_encoder(tokenizer: Tokenizer, params: Params) -> Callable[[loop.HostBatch], jax.Array]:
    """Names the tokens of this host's images on this host's devices, without waiting.

    Args:
      tokenizer: the tokenizer.
      params: what encoding needs; they are put on the devices here, beside the train step's own.

    Returns:
      A batch with `token_image`, uint8 `[b, s, s, 3]`, and its jitter where that is left to the
      device (`training.device_jitter`) → uint16 `[b, tokens]`. b must divide over the host's
      devices.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("images",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("images"))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def name(params: Params, batch: Batch) -> jax.Array:
        ids = tokenizer.encode(params, jitter_batch(batch)["token_image"])
        return ids.reshape(ids.shape[0], -1).astype(jnp.uint16)

    encode = jax.jit(name, out_shardings=split)

    def started(batch: loop.HostBatch) -> jax.Array:
        needed = {name: batch[name] for name in ("token_image", *JITTER_FIELDS) if name in batch}
        return encode(placed, jax.device_put(needed, split))

    return started


def name_tokens(
    full: loop.Feed,
    *,
    lean: loop.Feed,
    cache: TokenCache,
    encode: Callable[[loop.HostBatch], jax.Array],
) -> loop.Feed:
    """`full` with `token_ids`, uint16 `[b, tokens]`, in place of `token_image`.

    Ids come from the cache, or else from `encode`, which is set to work one batch ahead: a device
    has done it before it comes to the step that needs them. As long as the cache knows them, `lean`
    is read in place of `full`.

    Args:
      full: with `image` and `token_image`.
      lean: the same without `token_image`.
      cache: this host's.
      encode: `local_encoder`'s.
    """
    counts = {"tokenized_images": 0.0, "images_with_known_tokens": 0.0}

    def started(start_step: int) -> Iterator[tuple[int, loop.HostBatch, Any, bool]]:
        """Steps, batches, their ids (or ids being computed), and whether these are new."""
        step, reads_lean, lean_failed_at, lean_works = start_step, False, -1, True
        while True:
            for batch in (lean if reads_lean else full).training(step):
                ids = cache.read(step, images=batch["image"])
                if reads_lean and ids is None:
                    reads_lean, lean_failed_at = False, step
                    break  # this batch once more, with what the tokenizer needs
                new = ids is None
                if new:
                    ids = encode(batch)
                counts["tokenized_images" if new else "images_with_known_tokens"] += len(ids)
                batch.pop("token_image", None)
                yield step, batch, ids, new
                if not new and not reads_lean and step == lean_failed_at:
                    logging.warning("token cache: view 1 depends on view 2; both are made always")
                    lean_works = False
                step += 1
                if not new and not reads_lean and lean_works:
                    reads_lean = True
                    break

    def training(start_step: int) -> Iterator[loop.HostBatch]:
        ahead: collections.deque = collections.deque()
        for each in started(start_step):
            ahead.append(each)
            if len(ahead) < 2:
                continue
            step, batch, ids, new = ahead.popleft()
            ids = np.asarray(ids)
            if new:
                cache.write(step, images=batch["image"], ids=ids)
            yield batch | {"token_ids": ids}

    def metrics() -> dict[str, float]:
        both, also = full.metrics(), lean.metrics()
        return {name: value + also[name] for name, value in both.items()} | counts

    return dataclasses.replace(full, training=training, metrics=metrics)
