"""Reads what `torch.save` wrote without running code from it, and without PyTorch.

A pickle is a program: it may name any importable function and call it. Here allow-listed classes
become inert placeholders, and any other name is an error that says the name, before anything is
called. Tensors become NumPy arrays. Both containers are read: zip (PyTorch ≥ 1.6) and the older
stream.

    state = pickles.load("beit_base.pth")["model"]          # {"cls_token": array, ...}
    module = pickles.load("encoder.pkl")                    # a Record
    state = pickles.module_state(module)                    # its state dict
"""

import collections
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
from etils import epath

from beit_jax.types import PyTree
from beit_jax.weights.report import WeightsError

# The first object in a stream of the older container (torch/serialization.py).
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Classes whose objects become `Record`s. Training scripts save those of the second group beside the
# weights; nothing is read from them.
_RECORDS = {
    *(("dall_e.encoder", name) for name in ("Encoder", "EncoderBlock")),
    *(("dall_e.decoder", name) for name in ("Decoder", "DecoderBlock")),
    ("dall_e.utils", "Conv2d"),
    ("torch", "device"),
    ("argparse", "Namespace"),
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}
_RECORD_MODULES = ("torch.nn.modules.",)


class Record:
    """An inert placeholder for an object: the name of its class and its attributes.

    Attributes:
      of: the class, "dall_e.encoder.Encoder".
      fields: the attributes; empty where the object had other state.
    """

    of = ""
    fields: dict[str, PyTree]

    def __new__(cls, *args: object, **kwargs: object) -> "Record":
        record = super().__new__(cls)
        record.fields = {}
        return record

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], dict):
            state = state[0]
        self.fields = dict(state) if isinstance(state, dict) else {}


class _Refused(Exception):
    """The pickle names something that is not allow-listed."""


class _Unpickler(pickle.Unpickler):
    """Unpickles with placeholders, made anew for every pickle, which can set their attributes."""

    def __init__(self, file: io.BytesIO, *, storage: Callable[[PyTree], PyTree] | None = None):
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self._classes: dict[tuple[str, str], Callable[..., PyTree]] = {}

    def find_class(self, module: str, name: str) -> Callable[..., PyTree]:
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = self._placeholder(module, name)
        return self._classes[key]

    def persistent_load(self, saved_id: PyTree) -> PyTree:
        if self._storage is None:
            raise pickle.UnpicklingError("a reference outside of the tensors' pickle")
        return self._storage(saved_id)

    def _placeholder(self, module: str, name: str) -> Callable[..., PyTree]:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("builtins", "__builtin__") and name == "set":
            return set
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return type(name, (Record,), {"of": name})
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_tensor"),
        ):
            return lambda *args: _tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *args: data
        if (module, name) in _RECORDS or module.startswith(_RECORD_MODULES):
            return type(name, (Record,), {"of": f"{module}.{name}"})
        raise _Refused(f"{module}.{name}")


def load(path: str) -> PyTree:
    """Reads what `torch.save` wrote: dicts, lists, numbers, NumPy arrays, and `Record`s.

    Args:
      path: local or gs://.

    Raises:
      WeightsError: no such file; a text file; a damaged one; or one that names something that is
        not allow-listed, in which case nothing in it has been called.
    """
    content = read_bytes(path)
    return loads(content, source=path)


def read_bytes(path: str) -> bytes:
    """A file's bytes, local or gs://; raises WeightsError where there is no file."""
    file = epath.Path(path)
    if not file.exists():
        raise WeightsError(f"{path} does not exist")
    if file.is_dir():
        raise WeightsError(f"{path} is a folder")
    return file.read_bytes()


def loads(content: bytes, *, source: str) -> PyTree:
    """Does the work of `load` on bytes; `source` is for messages."""
    if not content:
        raise WeightsError(f"{source} is empty")
    refuse_text(content, source=source)
    try:
        if content[:2] == b"PK":
            return _load_zip(content, source=source)
        return _load_stream(content, source=source)
    except _Refused as error:
        raise WeightsError(
            f"{source} is refused: it names {error}, which loading would import and may run;"
            " only tensors and the modules of DALL-E are read"
        ) from None
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(
            f"{source} ({len(content)} bytes) is damaged or cut off:"
            f" {type(error).__name__}: {_one_line(error)}"
        ) from None


def module_state(module: PyTree, prefix: str = "") -> dict[str, np.ndarray]:
    """Collects the state dict of a pickled `nn.Module` from its `Record`s."""
    if not isinstance(module, Record) or "_modules" not in module.fields:
        return {}
    state = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in (module.fields.get(kind) or {}).items():
            if isinstance(value, np.ndarray):
                state[f"{prefix}{name}"] = value
    for name, child in module.fields["_modules"].items():
        state |= module_state(child, f"{prefix}{name}.")
    return state


def refuse_text(content: bytes, *, source: str) -> None:
    """Raises WeightsError for a text file: the log of `wget -o`, an error page."""
    head = content[:512]
    if head[:1] == b"\x80" or head[:2] == b"PK":
        return
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return
    if not all(character.isprintable() or character in "\r\n\t" for character in text):
        return
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")[:60]
    raise WeightsError(
        f"{source} is a text file, not weights; it starts with {first!r}. BEiT's instructions say"
        " `wget -o encoder.pkl`, which writes wget's log there: download again with a capital"
        " letter, `wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl`"
    )


def _load_zip(content: bytes, *, source: str) -> PyTree:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{source} ({len(content)} bytes) is damaged or cut off: {_one_line(error)}"
        ) from None
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{source} is a zip file, but not one of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(f"{root}code/") for name in names):
        raise WeightsError(f"{source} is a TorchScript program, not weights")
    order = "little"
    if f"{root}byteorder" in names:
        order = archive.read(f"{root}byteorder").decode()
    storages: dict[str, np.ndarray] = {}

    def storage(saved_id: PyTree) -> np.ndarray:
        _, kind, key, _, count = saved_id[:5]
        if key not in storages:
            array = np.frombuffer(archive.read(f"{root}data/{key}"), _dtype(kind))
            storages[key] = _native_order(array[:count], order)
        return storages[key]

    return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage=storage).load()


def _load_stream(content: bytes, *, source: str) -> PyTree:
    file = io.BytesIO(content)
    if _Unpickler(file).load() != _MAGIC:
        raise WeightsError(f"{source} is a pickle, but not one of torch.save")
    if _Unpickler(file).load() != _PROTOCOL:
        raise WeightsError(f"{source} was written by an unknown version of torch.save")
    system = _Unpickler(file).load()
    order = "little" if system.get("little_endian", True) else "big"
    # The numbers follow the pickle, so arrays are allocated here and filled afterwards.
    storages: dict[str, np.ndarray] = {}

    def storage(saved_id: PyTree) -> PyTree:
        if saved_id[0] == "module":  # a class with its source text, which nobody reads
            return saved_id[1]
        _, kind, key, _, count, view = saved_id
        dtype: np.dtype = np.dtype(_dtype(kind))
        if key not in storages:
            if count * dtype.itemsize > len(content):
                raise EOFError(f"{count} numbers announced")
            storages[key] = np.zeros(count, dtype)
        if view is not None:
            _, offset, length = view
            return storages[key][offset : offset + length]
        return storages[key]

    result = _Unpickler(file, storage=storage).load()
    for key in _Unpickler(file).load():
        array = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        data = file.read(count * array.dtype.itemsize)
        if count != array.size or len(data) != array.nbytes:
            raise EOFError("the file ends within a tensor")
        array[:] = _native_order(np.frombuffer(data, array.dtype), order)
    return result


def _dtype(kind: object) -> type[np.generic]:
    name = getattr(kind, "of", None)
    if name not in _STORAGES:
        raise pickle.UnpicklingError(f"storage of kind {kind!r}")
    return _STORAGES[name]


def _native_order(array: np.ndarray, order: str) -> np.ndarray:
    return array if order == sys.byteorder else array.byteswap()


def _tensor(
    storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> np.ndarray:
    """A view of a storage, checked to lie inside it."""
    if not isinstance(storage, np.ndarray) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if min((offset, *size, *stride)) < 0:
        raise pickle.UnpicklingError("a tensor with negative sizes")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.size:
        raise EOFError(f"a tensor of shape {tuple(size)} ends behind its {storage.size} numbers")
    steps = [step * storage.itemsize for step in stride]
    if 0 in size:
        return np.zeros(size, storage.dtype)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
