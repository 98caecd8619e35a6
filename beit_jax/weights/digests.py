"""Digests of arrays and of a config, saved with a checkpoint so that one flipped bit is noticed.

Orbax' files have no checksum of their numbers: a damaged one is read as other weights. So a
checkpoint has a third item, `digests`:

    {"kind": "sums-1", "config": SHA-256 of the config's JSON,
     "arrays": {"params/head/kernel": ["float32", [768, 8192], "9e3779b97f4a7c15"], ...}}

An array's digest is a pair of sums modulo 2³² over its elements, each element's bits mixed with its
index by functions that are one-to-one. So

- a change within any 32 bits changes the first sum for certain, and any other damage goes unnoticed
  once in 2⁶⁴;
- integer sums don't depend on their order: the digest is the same on any number of devices and
  hosts, however the array is split, and is computed where the array lies, at the speed of its
  memory.

It is no signature: who can write the checkpoint can write its digests too.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beit_jax.config.parse import shown
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.models.functional import flatten
from beit_jax.types import Json, JsonObject, PyTree

ITEM = "digests"  # the name of the item in a checkpoint's folder
KIND = "sums-1"
_CHUNK = 1 << 16  # elements that NumPy mixes at once, so that they stay in the core's cache
_WORD = 1 << 32
_FETCHED = 1 << 18  # elements of an array that is summed on the host, wherever it is

T = TypeVar("T", np.ndarray, jax.Array)


def item(tree: PyTree, *, config: JsonObject) -> JsonObject:
    """What a checkpoint of `tree`, saved with `config`, has as its item `digests`.

    Args:
      tree: nested dicts of arrays, NumPy's or JAX'. With arrays of several hosts, all call it.
      config: as it is saved, anything that JSON holds.
    """
    arrays = flatten(tree)
    found = of_arrays(arrays)
    return {
        "kind": KIND,
        "config": of_config(config),
        "arrays": {name: [*_facts(leaf), found[name]] for name, leaf in arrays.items()},
    }


def of_config(config: Json) -> str:
    """SHA-256 of a config, however its JSON is spaced and ordered."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def of_arrays(arrays: Mapping[str, np.ndarray | jax.Array]) -> dict[str, str]:
    """Digests, 16 hexadecimal digits each; see the module's docstring."""
    # First, so that the devices compute while the host does.
    large = {
        name: _on_devices(leaf)
        for name, leaf in arrays.items()
        if isinstance(leaf, jax.Array) and _stays(leaf)
    }
    small = {name: _on_host(np.asarray(leaf)) for name, leaf in arrays.items() if name not in large}
    sums = small | jax.device_get(large)
    return {name: "".join(f"{int(half):08x}" for half in sums[name]) for name in arrays}


def _stays(leaf: jax.Array) -> bool:
    """Whether an array is summed where it is; a small one is fetched sooner than XLA compiles."""
    here = leaf.is_fully_addressable or leaf.is_fully_replicated
    return leaf.size > _FETCHED or not here


def read(checkpoint: epath.Path) -> JsonObject | None:
    """The item `digests` of a checkpoint's folder; None where it was written without one.

    Raises:
      ValueError: the checkpoint was written with digests, which can't be read.
    """
    path = checkpoint / ITEM / "metadata"
    if not (checkpoint / ITEM).exists():
        # Orbax' own record of what it wrote; checkpoints of older versions name no such item.
        record = checkpoint / "_CHECKPOINT_METADATA"
        if record.exists() and f'"{ITEM}"'.encode() in record.read_bytes():
            raise ValueError(f"its folder {ITEM} is missing")
        return None
    try:
        found = read_json_object(path)
        valid = (
            found["kind"] == KIND
            and isinstance(found["config"], str)
            and all(len(entry) == 3 for entry in found["arrays"].values())
        )
    except (JsonError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read") from error
    if not valid:
        raise ValueError(f"{path} can't be read")
    return found


def config_problem(stored: JsonObject | None, config: Json) -> str:
    """What is wrong with a config that was read back; "" where nothing is, or nothing is known.

    Args:
      stored: from `read`.
      config: as it was read.
    """
    if stored is None or stored["config"] == of_config(config):
        return ""
    return "its config is not the one that was saved"


def shapes_problem(stored: JsonObject | None, tree: PyTree, *, part: str = "") -> str:
    """What is wrong with names, shapes and dtypes; "" where nothing is, or nothing is known.

    Args:
      stored: from `read`.
      tree: nested dicts of arrays or of their shapes.
      part: the names in `stored` that start with this are those of `tree`: "params/".
    """
    if stored is None:
        return ""
    saved = {name: entry for name, entry in stored["arrays"].items() if name.startswith(part)}
    found = {f"{part}{name}": leaf for name, leaf in flatten(tree).items()}
    for name in sorted(saved.keys() ^ found.keys()):
        return f"{shown(name)} is {'missing' if name in saved else 'not what was saved with it'}"
    for name, leaf in found.items():
        if saved[name][:2] != _facts(leaf):
            was, now = ("{}{}".format(*facts[:2]) for facts in (saved[name], _facts(leaf)))
            return f"{name} is {shown(now)}, and was saved as {shown(was)}"
    return ""


def arrays_problem(stored: JsonObject | None, tree: PyTree, *, part: str = "") -> str:
    """What is wrong with arrays that were read back; "" where nothing is, or nothing is known.

    Args:
      stored: from `read`.
      tree: nested dicts of arrays, NumPy's or JAX'. With arrays of several hosts, all call it.
      part: see `shapes_problem`.
    """
    if stored is None:
        return ""
    problem = shapes_problem(stored, tree, part=part)
    if problem:
        return problem
    found = of_arrays(flatten(tree))
    altered = [name for name in found if stored["arrays"][part + name][2] != found[name]]
    if not altered:
        return ""
    more = f" and {len(altered) - 1} more arrays" if len(altered) > 1 else ""
    return f"{part}{altered[0]}{more} do{'' if more else 'es'} not hold the numbers that were saved"


def _facts(leaf: np.ndarray | jax.Array | jax.ShapeDtypeStruct) -> list[Json]:
    if not hasattr(leaf, "dtype"):  # a Python number
        leaf = np.asarray(leaf)
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def _mix(x: T) -> T:
    """One-to-one on 32 bits, and every bit of the result depends on every one of `x`.

    Multiplications by odd numbers and shifts to the right that are xored, as hash functions end.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _terms(words: T, index: T) -> tuple[T, T]:
    """What every word adds to the two sums, uint32 like the words and their indices."""
    first = _mix(words ^ _mix(index))
    second = (first ^ np.uint32(0x9E3779B9)) * np.uint32(0x27D4EB2F)
    return first, (second ^ (second >> 15)) * np.uint32(0x165667B1)


def _on_host(array: np.ndarray) -> np.ndarray:
    """The two sums of a NumPy array, uint32 [2]."""
    array = np.ascontiguousarray(array)
    width = min(array.dtype.itemsize, 4)  # 64 bits are two words
    words = array.reshape(-1).view(np.dtype(f"u{width}"))
    total = np.zeros(2, np.uint32)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint32, copy=False)
        index = np.arange(len(part), dtype=np.uint32) + np.uint32(start % _WORD)
        total += np.array([terms.sum(dtype=np.uint32) for terms in _terms(part, index)])
    return total


def _on_devices(array: jax.Array) -> jax.Array:
    """The two sums of an array on devices, uint32 [2], the same on every device and host."""
    mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
    return _compiled(mesh if isinstance(mesh, Mesh) else None)(array)


@functools.lru_cache
def _compiled(mesh: Mesh | None) -> jax.stages.Wrapped:
    # One program for every shape, not one for a whole state, which takes seconds to compile.
    if mesh is None:
        return jax.jit(_sums)
    return jax.jit(_sums, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _sums(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        width = min(array.dtype.itemsize, 4)
        words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    words = words.reshape(words.shape or (1,))
    # Row-major, and modulo 2³² where an array has more words than that.
    strides = [math.prod(words.shape[axis + 1 :]) % _WORD for axis in range(words.ndim)]
    index = sum(
        lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    zero = np.uint32(0)
    # Both sums in one reduction: on a CPU, XLA makes ten times the speed of it that two have.
    sums = lax.reduce(
        _terms(words, jnp.asarray(index, jnp.uint32)),
        (zero, zero),
        lambda total, terms: (total[0] + terms[0], total[1] + terms[1]),
        tuple(range(words.ndim)),
    )
    return jnp.stack(sums)
