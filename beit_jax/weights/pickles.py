"""Reads what `torch.save` wrote without running code from it, and without PyTorch.

A pickle is a program: it may name any importable function and call it. Here known names become
inert placeholders (`placeholders`), and any other is an error that says the name; nothing that is
named is imported or called. Tensors become NumPy arrays. Both containers are read: zip (PyTorch
≥ 1.6) and the older stream.

    state = pickles.load("beit_base.pth")["model"]          # {"cls_token": array, ...}
    module = pickles.load("encoder.pkl")                    # a Record
    state = pickles.module_state(module)                    # its state dict
"""

import codecs
import io
import pickle
import re
import struct
import sys
import zipfile

import numpy as np
from etils import epath

from beit_jax.files import is_elsewhere, read_regular
from beit_jax.types import PyTree
from beit_jax.weights.archives import open_zip
from beit_jax.weights.placeholders import STORAGES, Refused
from beit_jax.weights.placeholders import Record as Record
from beit_jax.weights.report import WeightsError
from beit_jax.weights.unpickler import Unpickler, check_size

# The first object in a stream of the older container (torch/serialization.py).
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MOST_LOOKS = 200_000
_LONGEST_PREFIX = 1000
_LFS_POINTER = "version https://git-lfs.github.com/spec/"
# What other containers start with: containers that hold weights, but not in a way that is read.
_OTHERS = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x89HDF": "an HDF5 file, as TensorFlow and Keras write; PyTorch's or safetensors are read",
}


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
    """A file's bytes, local or gs://; raises WeightsError where there is no file to read."""
    if is_elsewhere(path):
        raise WeightsError(f"{path} is no path: download it first (only gs:// is read from afar)")
    try:
        file = epath.Path(path)
        if not file.exists():
            raise WeightsError(f"{path} does not exist")
        if file.is_dir():
            raise WeightsError(f"{path} is a folder")
        return read_regular(path)
    except WeightsError:
        raise
    except (OSError, ValueError) as error:  # no permission, NUL in a name
        why = getattr(error, "strerror", None) or error
        raise WeightsError(f"{path} can't be read: {why}") from None


def loads(content: bytes, *, source: str) -> PyTree:
    """Does the work of `load` on bytes; `source` is for messages."""
    refuse_text(content, source=source)
    try:
        return _load(content, source=source)
    except Refused as error:
        if error.kind:
            raise WeightsError(f"{source} holds {error.kind}") from None
        raise WeightsError(
            f"{source} is refused: it names {error}, which loading would import and may run; only"
            " tensors and plain settings are read. If you trust the file, keep its weights alone,"
            f" in PyTorch: {_recipe(content, source=source, subclass=error.subclass)}"
        ) from None
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(
            f"{source} ({len(content)} bytes) is damaged or cut off:"
            f" {type(error).__name__}: {_one_line(error)}"
        ) from None


def _load(content: bytes, *, source: str, lenient: bool = False) -> PyTree:
    load = _load_zip if content[:2] == b"PK" else _load_stream
    return load(content, source=source, lenient=lenient)


def _recipe(content: bytes, *, source: str, subclass: bool) -> str:
    """The line of PyTorch that saves the weights of a refused file without what is beside them."""
    whole = f'torch.load("{source}", weights_only=False)'
    try:
        found = _load(content, source=source, lenient=True)
    except Exception:  # damaged, too
        found = {}
    only_tensors = False
    if isinstance(found, dict):
        keys = [key for key, value in found.items() if isinstance(key, str) and _has_tensors(value)]
        known = [key for key in ("state_dict", "model", "module") if key in keys]
        key = next(iter((*known, *keys)), "model")
        # A state dict itself, with something else in it.
        only_tensors = not keys and any(isinstance(v, np.ndarray) for v in found.values())
        if not only_tensors:
            whole, found = f"{whole}[{key!r}]", found.get(key)
    if isinstance(found, Record):
        whole += ".state_dict()"
    value = "v.as_subclass(torch.Tensor)" if subclass else "v"
    if only_tensors or subclass:
        whole = f"{{k: {value} for k, v in {whole}.items() if torch.is_tensor(v)}}"
    return f'torch.save({whole}, "weights.pth")'


def _has_tensors(value: PyTree, depth: int = 3, budget: list[int] | None = None) -> bool:
    """Whether a value is a state dict, has one in it, or is a pickled module.

    The budget is for a dict within itself many times over.
    """
    budget = [_MOST_LOOKS] if budget is None else budget
    budget[0] -= 1
    if isinstance(value, Record):
        return "_modules" in value.fields
    if not isinstance(value, dict) or not depth or budget[0] < 0:
        return isinstance(value, np.ndarray) and depth < 3
    return any(
        _has_tensors(item, depth - 1, budget)
        for key, item in value.items()
        if isinstance(key, str) and budget[0] > 0
    )


def module_state(
    module: PyTree, prefix: str = "", *, budget: list[int] | None = None
) -> dict[str, np.ndarray]:
    """Collects the state dict of a pickled `nn.Module` from its `Record`s.

    Raises RecursionError for modules within themselves, or the same ones many times over.
    """
    budget = [_MOST_LOOKS] if budget is None else budget
    budget[0] -= 1
    if not isinstance(module, Record) or "_modules" not in module.fields:
        return {}
    if len(prefix) > _LONGEST_PREFIX or budget[0] < 0:
        raise RecursionError
    state = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in (module.fields.get(kind) or {}).items():
            if isinstance(value, np.ndarray):
                state[f"{prefix}{name}"] = value
    for name, child in module.fields["_modules"].items():
        state |= module_state(child, f"{prefix}{name}.", budget=budget)
    return state


def refuse_text(content: bytes, *, source: str) -> None:
    """Raises WeightsError for what is no file of weights at all, and says what it is.

    An empty file, a Git-LFS pointer, an error page, the log of `wget -o`, any other text, or
    another container's first bytes.
    """
    if not content:
        raise WeightsError(f"{source} is empty")
    for start, what in _OTHERS.items():
        if content.startswith(start):
            raise WeightsError(f"{source} is {what}")
    if content[257:262] == b"ustar":
        raise WeightsError(f"{source} is a tar archive; unpack it first")
    head = content[:512]
    if head[:1] == b"\x80" or head[:2] == b"PK":
        return
    try:
        # Incremental, since the 512 bytes may end within a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return
    if not all(character.isprintable() or character in "\r\n\t" for character in text):
        return
    if not text:
        raise WeightsError(f"{source} is blank, not weights")
    if text.startswith(_LFS_POINTER):
        raise WeightsError(
            f"{source} is a Git-LFS pointer, not the weights it stands for; `git lfs pull` in its"
            " repository downloads them"
        )
    first = text.splitlines()[0].strip()[:60]
    if re.match(r"<(!doctype|html|\?xml|head|error)", text, re.IGNORECASE):
        raise WeightsError(
            f"{source} is a web page, not weights; it starts with {first!r}. The download got an"
            " error or a login page: look at it in a browser, and download again"
        )
    log = re.match(r"--[\d-]+ [\d:]+--\s+(\S+)", text)
    advice = ""
    if log:
        name = source.rsplit("/", 1)[-1]
        advice = (
            f". That is wget's log, which `wget -o {name}` writes there: download again with a"
            f" capital letter, `wget -O {name} {log[1]}`"
        )
    raise WeightsError(f"{source} is a text file, not weights; it starts with {first!r}{advice}")


def _load_zip(content: bytes, *, source: str, lenient: bool) -> PyTree:
    try:
        archive = open_zip(content)
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
        if _text(key) not in storages:
            array = np.frombuffer(archive.read(f"{root}data/{key}"), _dtype(kind))
            storages[key] = _native_order(array[:count], order)
        return storages[key]

    file = io.BytesIO(archive.read(pickles[0]))
    result = Unpickler(file, storage=storage, lenient=lenient).load()
    check_size(result)
    return result


def _load_stream(content: bytes, *, source: str, lenient: bool) -> PyTree:
    file = io.BytesIO(content)
    if Unpickler(file).load() != _MAGIC:
        raise WeightsError(f"{source} is a pickle, but not one of torch.save")
    if Unpickler(file).load() != _PROTOCOL:
        raise WeightsError(f"{source} was written by an unknown version of torch.save")
    system = Unpickler(file).load()
    order = "little" if system.get("little_endian", True) else "big"
    # The numbers follow the pickle, so arrays are allocated here and filled afterwards.
    storages: dict[str, np.ndarray] = {}

    def storage(saved_id: PyTree) -> PyTree:
        if saved_id[0] == "module":  # a class with its source text, which nobody reads
            return saved_id[1]
        _, kind, key, _, count, view = saved_id
        dtype: np.dtype = np.dtype(_dtype(kind))
        if _text(key) not in storages:
            announced = sum(array.nbytes for array in storages.values()) + count * dtype.itemsize
            if announced > len(content):
                raise EOFError(f"{announced} bytes of numbers announced")
            storages[key] = np.zeros(count, dtype)
        if view is not None:
            _, offset, length = view
            return storages[key][offset : offset + length]
        return storages[key]

    start = file.tell()
    Unpickler(file, storage=storage, lenient=lenient).load()
    for key in Unpickler(file).load():
        array = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        data = file.read(count * array.dtype.itemsize)
        if count != array.size or len(data) != array.nbytes:
            raise EOFError("the file ends within a tensor")
        array[:] = _native_order(np.frombuffer(data, array.dtype), order)
    # Again, now that there are numbers: a tensor may be the negative of what is stored.
    file.seek(start)
    result = Unpickler(file, storage=storage, lenient=lenient).load()
    check_size(result)
    return result


def _text(key: object) -> str:
    if not isinstance(key, str):  # hashing something else may take for ever
        raise pickle.UnpicklingError(f"a storage is named by a {type(key).__name__}")
    return key


def _dtype(kind: object) -> type[np.generic]:
    name = getattr(kind, "of", None)
    if not isinstance(name, str) or name not in STORAGES:
        raise pickle.UnpicklingError("a storage of a kind that is not read")
    return STORAGES[name]


def _native_order(array: np.ndarray, order: str) -> np.ndarray:
    return array if order == sys.byteorder else array.byteswap()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
