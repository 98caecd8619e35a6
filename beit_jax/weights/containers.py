"""Files of tensors as bytes: safetensors, what `torch.save` writes, and their checksums.

content = read_bytes("model.safetensors")
state, metadata = load(content, source="model.safetensors")
"""

import hashlib
import json
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from beit_jax.files import write_whole
from beit_jax.types import FlatParams, PyTree
from beit_jax.weights import pickles
from beit_jax.weights.pickles import read_bytes as read_bytes
from beit_jax.weights.report import WeightsError

# Keys that a `.pth` may keep its state dict under: official, DeepSpeed, OpenMMLab.
_WRAPPERS = ("model", "module", "state_dict")
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def load(content: bytes, *, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file whose name says what it is.

    Args:
      content: the file.
      source: its name; one that ends in .safetensors is read as safetensors, any other as what
        `torch.save` wrote.

    Returns:
      Tensors by key, and the safetensors header's metadata (empty for the other kind).

    Raises:
      WeightsError: the file is damaged or refused.
    """
    if source.endswith(".safetensors"):
        return load_safetensors(content, source=source)
    return state_dict(pickles.loads(content, source=source), source=source), {}


def load_safetensors(
    content: bytes, *, source: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, bfloat16 included; WeightsError if damaged."""
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        pickles.refuse_text(content, source=source)
        raise WeightsError(
            f"{source} ({len(content)} bytes) is not a whole safetensors file: {error}"
        ) from None
    state = {}
    for name, entry in sorted(entries, key=lambda named: named[0]):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightsError(f"{source}: {name} is stored as {entry['dtype']}, which is not read")
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        state[name] = flat.reshape(entry["shape"])
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return state, header.get("__metadata__", {})


def state_dict(whole: PyTree, *, source: str) -> dict[str, np.ndarray]:
    """Finds the tensors in the content of a `.pth`: bare, wrapped, or a whole pickled module.

    Raises:
      WeightsError: there are none, or the module is damaged.
    """
    if isinstance(whole, pickles.Record):
        try:
            whole = pickles.module_state(whole)
        except (RecursionError, AttributeError):  # a module inside itself, or no dicts in it
            raise WeightsError(f"{source} holds a damaged module") from None
    for key in _WRAPPERS:
        if isinstance(whole, Mapping) and isinstance(whole.get(key), Mapping):
            whole = whole[key]
            break
    if not isinstance(whole, Mapping):
        raise WeightsError(f"{source} holds a {type(whole).__name__}, no state dict")
    state = {str(k): v for k, v in whole.items() if isinstance(v, np.ndarray)}
    if not state:
        raise WeightsError(f"{source} holds no tensors")
    if all(key.startswith("module.") for key in state):  # as DataParallel saves
        state = {key.removeprefix("module."): array for key, array in state.items()}
    return state


def check_sha256(content: bytes, expected: str, *, source: str) -> str:
    """The content's SHA-256; raises WeightsError where it is not `expected`, unless that is ""."""
    found = hashlib.sha256(content).hexdigest()
    if expected and expected.lower() != found:
        raise WeightsError(f"{source} has SHA-256 {found}, expected {expected}")
    return found


def write_safetensors(path: str, state: FlatParams, *, metadata: dict[str, str]) -> None:
    """Writes float32 tensors; readers see the old file or the whole new one."""
    # safetensors writes the bytes as they lie in memory: a transposed view would come out wrong.
    tensors = {key: np.array(array, np.float32, order="C") for key, array in state.items()}
    write_whole(path, safetensors.numpy.save(tensors, metadata=metadata))
