"""Weights in several files with an index, as transformers writes them above its limit per file.

    loaded = load(folder, "model.safetensors.index.json")
    loaded.state, loaded.sha256

An index is `{"weight_map": {"beit.embeddings.cls_token": "model-00001-of-00002.safetensors"}}`.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from etils import epath

from beit_jax.config.parse import shown
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.types import JsonObject
from beit_jax.weights import containers, pickles, prefixes
from beit_jax.weights.containers import Loaded
from beit_jax.weights.report import WeightsError, compact


def read_json(path: epath.Path) -> JsonObject:
    """A JSON object; raises WeightsError, in one line, for a file that is anything else."""
    try:
        return read_json_object(path)
    except JsonError as error:
        raise WeightsError(str(error)) from None


def weight_map(index: epath.Path) -> dict[str, str]:
    """Key → file, of an index; every file is a name in the index's own folder.

    Raises:
      WeightsError: no index, an empty one, or one that names a file elsewhere.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightsError(f"{index} has no weight_map from keys to files")
    for key, name in found.items():
        # A file from the internet must not decide what is read from this machine.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise WeightsError(
                f"{index} is refused: {shown(key)[1:-1]} is in {shown(name)}, which is not a file"
                " in its folder"
            )
    return found


def load(folder: epath.Path, index: str) -> Loaded:
    """Reads all shards that an index names, and checks that they hold what it says.

    Args:
      folder: of the index and the shards.
      index: its name.

    Returns:
      The tensors, with prefixes removed, the first shard's metadata, and the SHA-256 of all shards
      (`containers.combined_sha256`).

    Raises:
      WeightsError: a shard is missing or damaged, or its keys are not those of the index.
    """
    wanted = weight_map(folder / index)
    names = sorted(set(wanted.values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise WeightsError(
            f"{folder / index} names {len(names)} files, of which {len(absent)} are not there:"
            f" {', '.join(absent[:5])}"
        )
    state: dict[str, np.ndarray] = {}
    digests = []
    metadata: Mapping[str, str] = {}
    for name in names:
        source = str(folder / name)
        content = containers.read_bytes(source)
        digests.append((name, hashlib.sha256(content).hexdigest()))
        shard, header = _tensors(content, source=source)
        containers.check_size(shard, file_size=len(content), source=source)
        metadata = metadata or header
        expected = {key for key, file in wanted.items() if file == name}
        missing, more = expected - shard.keys(), shard.keys() - expected
        if missing or more:
            what = "lacks" if missing else "holds"
            some = compact(sorted(missing or more)[:20])
            raise WeightsError(f"{source} is not what {index} says: it {what} {some}")
        state |= shard
    containers.check_names(state, source=str(folder / index))
    state, notes = prefixes.plain_names(state, source=str(folder / index))
    return Loaded(
        source=str(folder / index),
        state=state,
        sha256=containers.combined_sha256(digests),
        metadata=metadata,
        notes=(f"weights: {len(names)} files; SHA-256 is that of their `sha256sum`", *notes),
    )


def _tensors(content: bytes, *, source: str) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    if containers.is_safetensors(content, source=source):
        return containers.load_safetensors(content, source=source)
    whole = pickles.loads(content, source=source)
    if not isinstance(whole, Mapping):
        raise WeightsError(f"{source} holds a {type(whole).__name__}, no state dict")
    return {str(key): value for key, value in whole.items() if isinstance(value, np.ndarray)}, {}
