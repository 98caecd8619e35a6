"""Settings that are saved beside weights are inert; anything else is refused by its name."""

import argparse
import builtins
import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import re
import sys
import types
import uuid
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from beit_jax.weights import opening, pickles
from beit_jax.weights.report import WeightsError
from beit_jax.weights.unpickler import Unpickler


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


class Settings(collections.OrderedDict):
    """What a project may make of its settings."""


class Options(dict):
    """The same, with attributes."""


class Color(enum.Enum):
    RED = 1


class Thing:
    """An object like any other."""


def options() -> Options:
    made = Options(a=1, b=Options(c=2))
    made.frozen = True
    return made


HARMLESS = {
    "a path": lambda torch: pathlib.Path("/data/x"),
    "a relative path": lambda torch: pathlib.PurePosixPath("a/b"),
    "a path of Windows": lambda torch: pathlib.PureWindowsPath("c:/x"),
    "a torch dtype": lambda torch: torch.float32,
    "a size": lambda torch: torch.Size([2, 3]),
    "a device": lambda torch: torch.device("cuda:0"),
    "a layout": lambda torch: torch.strided,
    "a generator": lambda torch: torch.Generator(),
    "a NumPy float": lambda torch: np.float32(0.5),
    "a NumPy int": lambda torch: np.int64(3),
    "a NumPy bool": lambda torch: np.bool_(True),
    "a NumPy string": lambda torch: np.str_("x"),
    "an array": lambda torch: np.arange(6.0).reshape(2, 3),
    "an array of objects": lambda torch: np.array(["a", None], object),
    "a NumPy dtype": lambda torch: np.dtype("f4"),
    "a class of NumPy": lambda torch: np.float32,
    "a dtype's class": lambda torch: type(np.dtype("f8")),
    "NumPy's random state": lambda torch: np.random.RandomState(0).get_state(),
    "a NumPy generator": lambda torch: np.random.default_rng(0),
    "an optimizer to be": lambda torch: functools.partial(torch.optim.AdamW, lr=0.1),
    "a defaultdict": lambda torch: collections.defaultdict(list, a=[1]),
    "a counter": lambda torch: collections.Counter("aab"),
    "a deque": lambda torch: collections.deque([1, 2], maxlen=5),
    "a date and time": lambda torch: datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "a date": lambda torch: datetime.date(2024, 1, 2),
    "a time": lambda torch: datetime.time(3, 4),
    "a time difference": lambda torch: datetime.timedelta(hours=3),
    "a frozenset": lambda torch: frozenset([1, 2]),
    "a set": lambda torch: {1, 2},
    "a complex number": lambda torch: 1 + 2j,
    "bytes": lambda torch: b"\x00\xff",
    "no bytes": lambda torch: b"",
    "a bytearray": lambda torch: bytearray(b"\x00\xff"),
    "a slice": lambda torch: slice(1, None, 2),
    "a range": lambda torch: range(3),
    "a class": lambda torch: int,
    "a decimal": lambda torch: decimal.Decimal("0.1"),
    "a fraction": lambda torch: fractions.Fraction(1, 3),
    "a UUID": lambda torch: uuid.UUID(int=3),
    "a Namespace": lambda torch: argparse.Namespace(lr=0.1, out=pathlib.Path("x")),
    "a SimpleNamespace": lambda torch: types.SimpleNamespace(a=1),
    "an OrderedDict": lambda torch: collections.OrderedDict(a=1),
    "a subclass of OrderedDict": lambda torch: Settings(a=1, b=Settings(c=2)),
    "a subclass of dict": lambda torch: options(),
    "a parameter with attributes": lambda torch: attributed(torch.nn.Parameter(torch.ones(2))),
    "a tensor with attributes": lambda torch: attributed(torch.ones(2)),
    "a buffer": lambda torch: torch.nn.Buffer(torch.ones(2)),
    "uint16": lambda torch: torch.tensor([1, 65535], dtype=torch.uint16),
    "float8": lambda torch: torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "complex64": lambda torch: torch.ones(2, dtype=torch.complex64),
    "ml_collections": lambda torch: pytest.importorskip("ml_collections").ConfigDict(
        {"a": 1, "b": {"c": 2}}
    ),
}


def attributed(tensor):
    tensor.lr_scale = 0.5
    return tensor


def saved(torch, whole, *, zipped=True, protocol=2) -> bytes:
    buffer = io.BytesIO()
    torch.save(whole, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("row", HARMLESS)
def test_settings_are_inert_and_the_weights_beside_them_exact(torch, row, protocol, zipped):
    weights = {"w": torch.arange(4.0)}
    for args in (HARMLESS[row](torch), argparse.Namespace(x=[HARMLESS[row](torch)])):
        whole = {"args": args, "model": weights, "after": 7}
        content = saved(torch, whole, zipped=zipped, protocol=protocol)
        read = pickles.loads(content, source="x.pth")
        assert read["model"]["w"].tolist() == [0, 1, 2, 3]
        assert read["after"] == 7
        assert isinstance(read["args"], _INERT), type(read["args"])


# What a value in a file may be once it is read: nothing of the class that the file named.
_INERT = (
    *(
        pickles.Record,
        dict,
        list,
        tuple,
        set,
        frozenset,
        str,
        bytes,
        bytearray,
        int,
        float,
        complex,
    ),
    *(type, slice, range, np.ndarray),
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pathlib.PurePosixPath("/data/x"), "/data/x"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(77.5), 77.5),
        (np.int64(-3), -3),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.array(5, ">i4")[()], 5),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.deque([1, 2], maxlen=5), [1, 2]),
        (Settings(a=1), {"a": 1}),
        (b"\x00\xff", b"\x00\xff"),
        (frozenset([1]), frozenset([1])),
        (1 + 2j, 1 + 2j),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_are_kept(torch, value, expected, protocol):
    content = saved(torch, {"x": value}, protocol=protocol)
    read = pickles.loads(content, source="x")["x"]
    assert read == expected
    assert type(read) is not type(value) or type(value) in (bytes, frozenset, complex)


def test_torch_dtypes_are_their_names(torch):
    content = saved(torch, {"x": torch.bfloat16, "y": torch.long})
    assert pickles.loads(content, source="x") == {"x": "torch.bfloat16", "y": "torch.int64"}


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath"), (b"numpy._core", b"numpy.core")],
    ids=["Python 3.13", "NumPy 1"],
)
def test_names_of_other_versions(torch, old, new):
    whole = {"path": pathlib.PosixPath("a/b"), "number": np.float64(0.5)}
    content = saved(torch, whole, zipped=False)
    content = content.replace(b"cpathlib._local\nPosixPath", b"cpathlib\nPosixPath")
    assert old in content
    read = pickles.loads(content.replace(old, new), source="x")
    assert read == {"path": "a/b", "number": 0.5}


def test_kinds_without_a_storage_of_their_own_are_exact(torch):
    whole = {
        "u": torch.tensor([[1, 65535], [3, 4]], dtype=torch.uint16).t(),
        "f": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
    }
    read = pickles.loads(saved(torch, whole), source="x")
    assert read["u"].tolist() == [[1, 3], [65535, 4]]
    assert read["f"].dtype == ml_dtypes.float8_e4m3fn
    assert read["f"].astype(np.float32).tolist() == [0.5, -448.0]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_sign_that_pytorch_keeps_apart_is_applied(torch, zipped):
    """A negative or conjugate view is saved as its numbers and a bit that says so."""
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    whole = {
        "negative": torch._neg_view(values).t(),
        "imaginary": torch.complex(values, values + 1).conj().imag,
        "conjugate": torch.complex(values, values + 1).conj(),
        "parameter": torch.nn.Parameter(torch._neg_view(values)),
    }
    assert whole["negative"].is_neg()
    assert whole["conjugate"].is_conj()
    read = pickles.loads(saved(torch, whole, zipped=zipped), source="x")
    for name, tensor in whole.items():
        expected = tensor.detach().resolve_conj().resolve_neg().numpy()
        np.testing.assert_array_equal(read[name], expected, err_msg=name)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda torch: torch.eye(3).to_sparse(), r"holds sparse tensors; save .* \.to_dense\(\)$"),
        (lambda torch: torch.zeros(2, device="meta"), "holds tensors on the device meta"),
    ],
)
def test_kinds_of_tensors_that_are_not_read_are_said(torch, tensor, message):
    content = saved(torch, {"model": {"w": tensor(torch)}})
    with pytest.raises(WeightsError, match=message):
        pickles.loads(content, source="x.pth")


class Reduced:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments, items=None):
        self.reduced = (function, arguments, None, None, items)

    def __reduce__(self):
        return self.reduced


def touch(path):
    """What a hostile file would run; it lies in a module that a pickle can name."""
    pathlib.Path(path).touch()


HOSTILE = {
    "os.system": lambda trace: Reduced(os.system, f"touch {trace}"),
    "eval": lambda trace: Reduced(builtins.eval, f"open({str(trace)!r}, 'w')"),
    "exec": lambda trace: Reduced(builtins.exec, f"open({str(trace)!r}, 'w')"),
    "open": lambda trace: Reduced(builtins.open, str(trace), "w"),
    "getattr": lambda trace: Reduced(builtins.getattr, Reduced(os.getcwd), "upper"),
    "attrgetter": lambda trace: Reduced(operator.attrgetter, "system"),
    "methodcaller": lambda trace: Reduced(operator.methodcaller, "system", "x"),
    "partial": lambda trace: Reduced(functools.partial, touch, str(trace)),
    "import_module": lambda trace: Reduced(importlib.import_module, "antigravity"),
    "__import__": lambda trace: Reduced(builtins.__import__, "antigravity"),
    "a function of a module": lambda trace: Reduced(touch, str(trace)),
    "no arguments": lambda trace: Reduced(os.getcwd),
    "no arguments, unknown": lambda trace: Reduced(no_arguments),
    "a function that is filled": lambda trace: Reduced(touch, str(trace), items=iter([(1, 2)])),
    "os.system, filled": lambda trace: Reduced(os.getcwd, items=iter([("a", 1)])),
    "a factory": lambda trace: Reduced(collections.defaultdict, touch),
    "a bare name": lambda trace: touch,
    "an enum": lambda trace: Color.RED,
    "an object": lambda trace: Thing(),
    "an object's class": lambda trace: Thing,
    "an empty unknown dict": lambda trace: Settings(),
    "compile": lambda trace: Reduced(builtins.compile, "x", "y", "exec"),
    "input": lambda trace: Reduced(builtins.input),
    "exit": lambda trace: Reduced(sys.exit),
    "pickle.loads": lambda trace: Reduced(pickle.loads, b"x"),
    "a method": lambda trace: pathlib.Path(trace).touch,
}


def no_arguments():
    raise AssertionError("called")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("row", HOSTILE)
def test_anything_else_is_refused_and_not_run(torch, tmp_path, row, protocol, zipped):
    trace = tmp_path / "ran"
    whole = {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(x=HOSTILE[row](trace))}
    content = saved(torch, whole, zipped=zipped, protocol=protocol)
    modules = set(sys.modules)
    with (
        mock.patch("builtins.__import__", side_effect=AssertionError("imported")),
        pytest.raises(WeightsError, match=r"^x\.pth is refused: it names [\w.]+, which") as error,
    ):
        pickles.loads(content, source="x.pth")
    assert "\n" not in str(error.value)
    assert "torch.save(torch.load(\"x.pth\", weights_only=False)['model']" in str(error.value)
    assert not trace.exists()
    assert set(sys.modules) == modules


class Net:
    """Makes modules that a pickle names by a class nobody knows."""

    @staticmethod
    def of(torch):
        made = type("Unknown", (torch.nn.Linear,), {"__module__": __name__})
        globals()["Unknown"] = made
        return made(2, 3)


def subclassed(torch, weights):
    """Tensors of a class that nobody knows."""
    made = type("UnknownTensor", (torch.Tensor,), {"__module__": __name__})
    globals()["UnknownTensor"] = made
    return {key: tensor.as_subclass(made) for key, tensor in weights.items()}


REFUSED = {
    "a class of tensors": lambda torch, w: {"model": subclassed(torch, w)},
    "a class of tensors, bare": lambda torch, w: subclassed(torch, w),
    "model": lambda torch, w: {"model": w},
    "timm": lambda torch, w: {"arch": "x", "optimizer": {"state": {}}, "state_dict": w},
    "nested": lambda torch, w: {"epoch": 3, "model": {"module": w}},
    "another key": lambda torch, w: {"epoch": 3, "network": w},
    "bare": lambda torch, w: dict(w),
    "a module": lambda torch, w: Net.of(torch),
    "a module under a key": lambda torch, w: {"model": Net.of(torch), "epoch": 3},
}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of the module, for legacy
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("row", REFUSED)
def test_the_advice_of_a_refusal_works_when_followed(torch, tmp_path, monkeypatch, row, zipped):
    weights = torch.nn.Linear(2, 3).state_dict()
    whole = REFUSED[row](torch, weights)
    if isinstance(whole, dict):
        whole["harmless"] = Thing()
    path = tmp_path / "x.pth"
    path.write_bytes(saved(torch, whole, zipped=zipped))
    with pytest.raises(WeightsError, match="refused: it names") as error:
        opening.open_file(str(path))
    (line,) = re.findall(r"in PyTorch: (torch\.save\(.*\))$", str(error.value))
    monkeypatch.chdir(tmp_path)
    exec(line, {"torch": torch})
    opened = opening.open_file(str(tmp_path / "weights.pth"))
    assert set(opened.state) == {"weight", "bias"}


@pytest.mark.parametrize(
    "bomb",
    [
        lambda: Reduced(frozenset, range(10**15)),
        lambda: Reduced(set, range(10**15)),
        lambda: Reduced(bytearray, 10**15),
        lambda: Reduced(collections.deque, range(10**15)),
        lambda: Reduced(collections.Counter, range(10**15)),
    ],
)
def test_small_pickles_do_not_fill_the_memory(torch, bomb):
    content = saved(torch, {"model": {"w": torch.ones(2)}, "args": bomb()})
    with contextlib.suppress(WeightsError):
        assert not pickles.loads(content, source="x.pth")["args"]


def test_what_is_made_without_arguments_and_filled_is_a_dict_and_is_not_called(torch):
    """A function could be written so; no one can tell, and nothing is called either way."""
    whole = {"args": Reduced(no_arguments, items=iter([("a", 1)]))}
    assert pickles.loads(saved(torch, whole), source="x") == {"args": {"a": 1}}


def test_placeholders_of_one_file_do_not_reach_the_next(torch):
    """A pickle may set attributes of a function it names; ours are made anew for each."""
    # (None, {"__defaults__": ...}) as the state of pathlib's name.
    evil = (
        b"\x80\x02cpathlib\nPosixPath\nN}X\x0c\x00\x00\x00__defaults__X\x01\x00\x00\x00a\x85s\x86b."
    )
    unpickler = Unpickler(io.BytesIO(evil))
    unpickler.load()
    content = saved(torch, {"x": pathlib.PurePosixPath("a/b")})
    assert pickles.loads(content, source="x")["x"] == "a/b"
