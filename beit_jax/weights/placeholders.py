"""What a name in a pickle becomes: a tensor, a plain value, or an inert placeholder.

Nothing that a pickle names is imported or called: `Names.find` gives an object made here for every
name it knows, and `Refused` for every other. What it knows is what training scripts save beside
weights: paths, dates, NumPy's numbers, settings.

    names = Names()
    names.find("pathlib", "PosixPath")("/", "data")     # "/data"
    names.find("argparse", "Namespace")                 # a class of `Record`s
    names.find("os", "system")                          # Refused
    names.check()                                       # for names that the end decides on
"""

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable

import ml_dtypes
import numpy as np

from beit_jax.types import PyTree

STORAGES: dict[str, type[np.generic]] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "UntypedStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Kinds that have no storage of their own: `_rebuild_tensor_v3` reads them out of bytes.
_UNTYPED: dict[str, type[np.generic]] = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# torch.float32 and its like are saved as bare names.
_TORCH_DTYPES = frozenset(_UNTYPED) | _words("""
    float64 double float32 float float16 half bfloat16 complex32 complex64 complex128
    int64 long int32 int int16 short int8 uint8 bool quint8 qint8 qint32
    float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
""")
# Classes that stand for themselves, as the factory of a defaultdict does; nothing is made of them.
_NUMPY_CLASSES = _words("""
    float64 float32 float16 longdouble int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool bool_
    complex64 complex128 str_ bytes_ intc uintc longlong ulonglong datetime64 timedelta64 ndarray
""")
_BUILTIN_CLASSES = _words("int float bool str list dict tuple object bytes long unicode Ellipsis")
_PATHS = frozenset(
    f"{pure}{system}Path" for pure in ("", "Pure") for system in ("", "Posix", "Windows")
)
# Classes whose objects become `Record`s: nothing is read from them but a Namespace's attributes.
_RECORDS = frozenset(
    {
        *(("dall_e.encoder", name) for name in ("Encoder", "EncoderBlock")),
        *(("dall_e.decoder", name) for name in ("Decoder", "DecoderBlock")),
        ("dall_e.utils", "Conv2d"),
        ("argparse", "Namespace"),
        ("types", "SimpleNamespace"),
        *(("datetime", name) for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(
            ("decimal", "Decimal"),
            ("fractions", "Fraction"),
            ("uuid", "UUID"),
            ("uuid", "SafeUUID"),
        ),
        *(("re", "_compile"), ("re", "RegexFlag")),
        ("torch", "device"),
        ("torch", "Generator"),
        ("torch._C", "Generator"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
        ("torch.nn.backends.thnn", "_get_thnn_function_backend"),
        ("torchvision.transforms.functional", "InterpolationMode"),
        ("transformers.models.beit.configuration_beit", "BeitConfig"),
        ("transformers.models.data2vec.configuration_data2vec_vision", "Data2VecVisionConfig"),
        ("functools", "partial"),  # Hydra's optimizers; what it would call must be known, too
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        # Older Lightning keeps the state of callbacks under their classes.
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
        # DictConfig and ListConfig keep what they hold among their attributes.
        *(("omegaconf.dictconfig", "DictConfig"), ("omegaconf.listconfig", "ListConfig")),
        *(("omegaconf.base", name) for name in ("ContainerMetadata", "Metadata")),
        *(
            ("omegaconf.nodes", f"{kind}Node")
            for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")
        ),
        ("typing", "Any"),
    }
)
_RECORD_MODULES = ("torch.nn.modules.", "torch.optim.", "numpy.dtypes.", "numpy.random.")
_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
# Dicts with another name.
_DICTS = frozenset(
    {
        ("ml_collections.config_dict.config_dict", "ConfigDict"),
        ("ml_collections.config_dict.config_dict", "FrozenConfigDict"),
        ("easydict", "EasyDict"),
        ("yacs.config", "CfgNode"),
        ("fvcore.common.config", "CfgNode"),
        ("addict.addict", "Dict"),
        ("mmcv.utils.config", "ConfigDict"),
        ("mmengine.config.config", "ConfigDict"),
        ("munch", "Munch"),
        ("box.box", "Box"),
        *(
            (f"{package}.utilities.parsing", "AttributeDict")
            for package in ("pytorch_lightning", "lightning.pytorch")
        ),
        *(
            (f"{package}.utilities.data", "AttributeDict")
            for package in ("lightning_fabric", "lightning.fabric")
        ),
    }
)


# Where an unknown name is refused at once: nobody's own class of settings is there.
_NEVER = sys.stdlib_module_names | {"__builtin__", "builtins", "torch", "numpy"}


_LONGEST_NAME = 300  # characters
_MOST_NAMES = 5000  # of a pickle; every one makes a class


class Refused(Exception):
    """The pickle names something that has no placeholder.

    Attributes:
      subclass: whether the name is that of a class of tensors.
      kind: what kind of tensor the name makes, that is not read; "" for any other name.
    """

    def __init__(self, name: str, *, subclass: bool = False):
        super().__init__(name)
        self.subclass = subclass
        self.kind = _NOT_READ.get(name.removeprefix("torch._utils."), "")


# Kinds of tensors with other numbers than a dense array's, and what makes one of them.
_NOT_READ = {
    "_rebuild_sparse_tensor": "sparse tensors; save them dense, by .to_dense()",
    "_rebuild_sparse_csr_tensor": "sparse tensors; save them dense, by .to_dense()",
    "_rebuild_nested_tensor": "nested tensors; save them as separate ones",
    "_rebuild_qtensor": "quantised tensors; save them as floats, by .dequantize()",
    "_rebuild_meta_tensor_no_storage": "tensors on the device meta, which have no numbers",
    "_rebuild_wrapper_subclass": "tensors of a class of their own; save them as plain ones",
}


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


class _Dict(dict):
    """An inert placeholder for a dict of another class; attributes are not kept."""

    of = ""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*(arg for arg in args[:1] if isinstance(arg, dict)))

    def __setstate__(self, state: object) -> None:
        # ml_collections keeps its items among the attributes.
        fields = state.get("_fields") if isinstance(state, dict) else None
        if isinstance(fields, dict):
            self.update(fields)


class _NumpyDtype(Record):
    """`numpy.dtype("f8", False, True)`, whose byte order comes afterwards as state."""

    def __init__(self, code: object = "", *_: object):
        self.code = code if isinstance(code, str) else ""
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def dtype(self) -> np.dtype | None:
        """NumPy's own, for numbers and bools; None for anything else."""
        codes = ("b1", *(f"{kind}{n}" for kind in "iuf" for n in (1, 2, 4, 8)))
        return (
            np.dtype(self.order + self.code) if self.code in codes and self.code != "f1" else None
        )


class Names:
    """Placeholders for the names of one pickle, made anew for each, which may set attributes.

    A class nobody knows is let pass where it does what only a dict's subclass can do: it is made
    without arguments and then filled with items. It becomes an inert dict. That takes the whole
    pickle to tell, so `check` is asked at the end.

    Args:
      lenient: makes a `Record` of everything unknown, to see what there is in a refused file.
      check_key: called with every item of a set before it is hashed.
    """

    def __init__(
        self, *, lenient: bool = False, check_key: Callable[[object], None] = lambda key: None
    ) -> None:
        self._lenient = lenient
        self._check_key = check_key
        self._found: dict[tuple[str, str], PyTree] = {}
        self._unknown: dict[str, list[_Dict]] = {}

    def find(self, module: str, name: str) -> PyTree:
        """What stands for `module.name`. Raises Refused where calling it would mean something."""
        key = (module, name)
        if len(module) + len(name) > _LONGEST_NAME or len(self._found) > _MOST_NAMES:
            raise pickle.UnpicklingError("a name too long, or too many of them")
        if key not in self._found:
            self._found[key] = self._make(module, name)
        return self._found[key]

    def check(self) -> None:
        """Raises Refused where an unknown name turned out to be anything but a filled dict."""
        for name, instances in self._unknown.items():
            if not instances or not all(instances):
                raise Refused(name)

    def _make(self, module: str, name: str) -> PyTree:
        named = f"{module}.{name}"
        module = "builtins" if module == "__builtin__" else module  # protocol 2's name for it
        of = f"{module}.{name}"
        if of == "collections.OrderedDict":
            return OrderedDict
        if of in ("builtins.set", "builtins.frozenset"):
            return lambda items=(): self._set(set if name == "set" else frozenset, items)
        if of in _FUNCTIONS:
            function = _FUNCTIONS[of]
            return lambda *args: function(*args)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return type(name, (Record,), {"of": name})
        if module == "torch" and name in _TORCH_DTYPES:
            return of
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return lambda *parts: _path(*parts)
        if of == "numpy.dtype":
            return type(name, (_NumpyDtype,), {"of": of})
        if (module, name) in _DICTS:
            return type(name, (_Dict,), {"of": of})
        is_class = module == "builtins" and name in _BUILTIN_CLASSES
        is_class |= module == "numpy" and name in _NUMPY_CLASSES
        if is_class or (module, name) in _RECORDS or f"{module}.".startswith(_RECORD_MODULES):
            return type(name, (Record,), {"of": of})
        if self._lenient:
            return type("Unknown", (Record,), {"of": named, "lenient": True})
        return self._suspect(named)

    def _set(self, kind: Callable[..., PyTree], items: object) -> PyTree:
        for item in items if isinstance(items, list | tuple) else ():
            self._check_key(item)
        return _sequence(kind)(items)

    def _suspect(self, of: str) -> type:
        if of.partition(".")[0] in _NEVER:
            raise Refused(of)
        instances = self._unknown.setdefault(of, [])

        def make(cls: type[_Dict], *args: object, **kwargs: object) -> _Dict:
            if args or kwargs:
                raise Refused(of)
            instance = dict.__new__(cls)
            instances.append(instance)
            return instance

        return type("Unknown", (_Dict,), {"of": of, "__new__": make})


def tensor(
    storage: object,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object = None,
    hooks: object = None,
    bits: object = None,
) -> np.ndarray:
    """A view of a storage, checked to lie inside it.

    `bits` are PyTorch's {"neg": True, "conj": True}: the numbers are stored without that step.
    """
    result = _view(storage, offset, size, stride)
    bits = bits if isinstance(bits, dict) else {}
    # Copied below, unlike a view of one number that is repeated without end.
    if bits and isinstance(storage, np.ndarray) and result.size > storage.size:
        raise pickle.UnpicklingError("a tensor that repeats its numbers, negated")
    if bits.get("conj"):
        result = np.conj(result)
    return -result if bits.get("neg") else result


def _view(
    storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> np.ndarray:
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


def _tensor_of_bytes(
    storage: object,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> np.ndarray:
    kind = _UNTYPED.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else None
    if kind is None or not isinstance(storage, np.ndarray) or storage.dtype != np.uint8:
        raise pickle.UnpicklingError("a tensor of a kind that is not read")
    whole = storage.size // np.dtype(kind).itemsize * np.dtype(kind).itemsize
    return _view(storage[:whole].view(kind), offset, size, stride)


def _tensor_with_attributes(rebuild: object, kind: object, args: tuple, *_: object) -> np.ndarray:
    """A tensor that was given Python attributes, which are dropped."""
    of = getattr(kind, "of", "")
    if of not in _TENSORS and not getattr(kind, "lenient", False):
        raise Refused(of, subclass=True)
    result = rebuild(*args) if callable(rebuild) else None
    if not isinstance(result, np.ndarray):
        raise pickle.UnpicklingError("a tensor of a class that is not read")
    return result


def _first(value: PyTree, *_: object) -> PyTree:
    return value


def _path(*parts: object) -> str:
    texts = [part for part in parts if isinstance(part, str)]
    return "/".join(texts).replace("//", "/", 1)


def _sequence(kind: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A constructor that takes only what is in memory already: set(range(10**12)) is refused."""

    def make(items: object = ()) -> PyTree:
        if not isinstance(items, list | tuple | set | frozenset):
            raise pickle.UnpicklingError(f"a {kind.__name__} of {type(items).__name__}")
        return kind(items)

    return make


def _numbers(kind: Callable[..., PyTree]) -> Callable[..., PyTree]:
    def make(*args: object) -> PyTree:
        if not all(isinstance(arg, int | float | None) for arg in args):
            raise pickle.UnpicklingError(f"a {kind.__name__} of no numbers")
        return kind(*args)

    return make


def _bytes(text: object = b"", encoding: object = "") -> bytes:
    """How protocol 2 writes bytes: text in latin-1."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes of {type(text).__name__}")
    return text.encode("latin-1")


def _scalar(dtype: object, data: object = b"") -> PyTree:
    """A NumPy number as Python's; a Record where it is something else."""
    kind = dtype.dtype() if isinstance(dtype, _NumpyDtype) else None
    if kind is None or not isinstance(data, bytes) or len(data) != kind.itemsize:
        return Record()
    return np.frombuffer(data, kind)[0].item()


def _empty_dict(*_: object) -> dict:
    return {}


def _counter(items: object = None) -> dict:
    return dict(items) if isinstance(items, dict) else {}


def _deque(items: object = (), *_: object) -> list:
    return list(items) if isinstance(items, list | tuple) else []


# Functions and constructors that give a value. All are ours; none of those named is ever reached.
_FUNCTIONS: dict[str, Callable[..., PyTree]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _sequence(tuple),
    "builtins.complex": _numbers(complex),
    "builtins.slice": _numbers(slice),
    "builtins.range": _numbers(range),
    "builtins.xrange": _numbers(range),
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "collections.defaultdict": _empty_dict,
    "collections.Counter": _counter,
    "collections.deque": _deque,
}
