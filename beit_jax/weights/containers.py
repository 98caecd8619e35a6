"""Files of tensors as bytes: safetensors, what `torch.save` writes, and their checksums.

content = read_bytes("model.safetensors")
loaded = load(content, source="model.safetensors")
loaded.state, loaded.metadata
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from beit_jax.config.parse import shown
from beit_jax.files import printable, write_whole
from beit_jax.json_text import JsonError, json_object
from beit_jax.types import FlatParams, JsonObject
from beit_jax.weights import pickles, unwrapping
from beit_jax.weights.archives import open_zip
from beit_jax.weights.pickles import read_bytes as read_bytes
from beit_jax.weights.report import WeightsError

# Of files that `load` reads. What is in them decides how, not the suffix.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar", ".zip")
_MOST_DIMENSIONS = 8
_COPIED = 8  # times its file that all tensors may have
_COPIED_ANYHOW = 256 << 20
_LONGEST_NAME = 500  # characters of a tensor's name
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a file of tensors holds.

    Attributes:
      source: the file, or the one file in a zip: "beit.zip/beit.pth".
      state: key → array.
      metadata: of a safetensors header; empty for other containers.
      notes: lines for the report: what was chosen where the file leaves a choice.
      extras: see `Opened.extras`.
      sha256: of the file, where the caller has set it.
    """

    source: str
    state: dict[str, np.ndarray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extras: JsonObject = dataclasses.field(default_factory=dict)
    sha256: str = ""


def load(content: bytes, *, source: str, weights: str = "") -> Loaded:
    """Tensors of a safetensors file, of what `torch.save` wrote, or of a zip with one such file.

    Args:
      content: the file, which says itself what it is.
      source: its name, for messages.
      weights: see `unwrapping.unwrap`.

    Raises:
      WeightsError: the file is damaged or refused, holds no tensors, or not those asked for.
    """
    content, source = _unzipped(content, source=source)
    metadata: Mapping[str, str] = {}
    if is_safetensors(content, source=source):
        whole, metadata = load_safetensors(content, source=source)
    else:
        whole = pickles.loads(content, source=source)
    found = unwrapping.unwrap(whole, source=source, weights=weights)
    check_names(found.state, source=source)
    check_size(found.state, file_size=len(content), source=source)
    return Loaded(
        source=source,
        state=found.state,
        metadata=metadata,
        notes=found.notes,
        extras=found.extras,
    )


def is_safetensors(content: bytes, *, source: str) -> bool:
    """Whether a file is to be read as safetensors: by its header, else by its name.

    Neither container of `torch.save` can have a brace after eight bytes that count a header.
    """
    if content[8:9] == b"{" and content[5:8] == bytes(3):
        return True
    return source.endswith(".safetensors") and content[:1] != b"\x80" and content[:2] != b"PK"


def _unzipped(content: bytes, *, source: str) -> tuple[bytes, str]:
    """The one file of weights in a zip, and its name; any other content as it is."""
    if content[:4] != b"PK\3\4":
        return content, source
    try:
        archive = open_zip(content)
        names = [name for name in archive.namelist() if not _is_hidden(name)]
        if any(name.endswith("data.pkl") for name in names):
            return content, source
        files = [name for name in names if name.endswith(SUFFIXES)]
        if len(files) == 1:
            return archive.read(files[0]), f"{source}/{_name(files[0])}"
    except Exception as error:  # a damaged archive can raise anything
        raise WeightsError(
            f"{source} ({len(content)} bytes) is a zip file that is damaged, cut off or locked:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
    what = (
        f"{len(files)} files of weights ({', '.join(map(_name, files[:5]))})"
        if files
        else "no weights"
    )
    raise WeightsError(
        f"{source} is a zip file, but not one of torch.save, and holds {what}; unpack it and give"
        " a file or folder of it"
    )


def _name(name: str) -> str:
    """The name of a file in a zip, as it is where it makes a line, else its end."""
    return printable(name[-_LONGEST_NAME:])


def _is_hidden(name: str) -> bool:
    return name.endswith("/") or any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def check_names(state: Iterable[str], *, source: str) -> None:
    """Raises WeightsError for a tensor whose name is no line of text of reasonable length."""
    for name in state:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise WeightsError(f"{source} holds a tensor that is called {shown(name)}")


def check_size(state: FlatParams, *, file_size: int, source: str) -> None:
    """Raises WeightsError where tensors share their numbers so often that copies would be absurd.

    Tied weights are there twice; a file of a few bytes may say that it holds any number of them.
    """
    found = sum(array.nbytes for array in state.values())
    if found > _COPIED * file_size + _COPIED_ANYHOW:
        raise WeightsError(
            f"{source} has {file_size} bytes, its tensors {found}, all the same ones"
        )


def load_safetensors(
    content: bytes, *, source: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, bfloat16 included; WeightsError if damaged."""
    if not content:
        pickles.refuse_text(content, source=source)
    try:
        header = _header(content)
        entries = safetensors.deserialize(content)
    except (safetensors.SafetensorError, JsonError) as error:
        pickles.refuse_text(content, source=source)
        raise WeightsError(
            f"{source} ({len(content)} bytes) is not a whole safetensors file: {error}"
        ) from None
    state = {}
    for name, entry in sorted(entries, key=lambda named: named[0]):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightsError(f"{source}: {name} is stored as {entry['dtype']}, which is not read")
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        if len(entry["shape"]) > _MOST_DIMENSIONS or math.prod(entry["shape"]) != flat.size:
            raise WeightsError(f"{source}: {name} has the shape {shown(entry['shape'])}")
        try:
            state[name] = flat.reshape(entry["shape"])
        except ValueError:  # none at all, by a number of rows that no array can have
            raise WeightsError(f"{source}: {name} has the shape {shown(entry['shape'])}") from None
    return state, header.get("__metadata__") or {}


def _header(content: bytes) -> JsonObject:
    """The JSON that a safetensors file starts with; {} where it is cut off within."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:  # left to safetensors to say
        return {}
    return json_object(content[8 : 8 + length], path="its header")


def check_sha256(content: bytes, expected: str, *, source: str) -> str:
    """The content's SHA-256; raises WeightsError where it is not `expected`, unless that is ""."""
    found = hashlib.sha256(content).hexdigest()
    check_digest(found, expected, source=source)
    return found


def check_digest(found: str, expected: str, *, source: str) -> None:
    """Raises WeightsError where a SHA-256 is not `expected`, unless that is ""."""
    if expected and expected.lower() != found:
        raise WeightsError(f"{source} has SHA-256 {found}, expected {expected}")


def combined_sha256(digests: Iterable[tuple[str, str]]) -> str:
    """One SHA-256 for several files, `(name, SHA-256)` each.

    It is what `sha256sum FILE... | sha256sum` prints in their folder: the digest of one line a
    file, in the order of the names.
    """
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def safetensors_bytes(state: FlatParams, *, metadata: dict[str, str]) -> bytes:
    """A safetensors file of float32 tensors, and of int64 ones as they are."""
    # safetensors writes the bytes as they lie in memory: a transposed view would come out wrong.
    tensors = {
        key: np.array(array, np.int64 if array.dtype == np.int64 else np.float32, order="C")
        for key, array in state.items()
    }
    return safetensors.numpy.save(tensors, metadata=metadata)


def write_safetensors(path: str, state: FlatParams, *, metadata: dict[str, str]) -> None:
    """Writes float32 tensors; readers see the old file or the whole new one."""
    write_whole(path, safetensors_bytes(state, metadata=metadata))
