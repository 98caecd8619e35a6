"""Files that somebody made to harm who reads them: what may stand in each place, by its name.

Every function gives `name → content`, bytes or a function that makes something else at a path.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

Content = bytes | Callable[[Path], None]
_MANY = 300_000
_HASH = 2**61 - 1  # Python's hash of a number is what it leaves modulo this
# Bare values where something else is due.
VALUES = [
    *(None, True, 0, -1, 10**30, 10**39, 1e308, 0.5, "", "x", [], {}, [1], {"a": 1}),
    *("x" * 10**6, "a\n\x1b[2J\0", "../../x", "/etc/passwd", "\ud800", [[[]]], ["a"] * 1000),
    *({"x" * 10**5: 1}, [None], [{}], [10**30], {"0": None}, 2**63, -(2**63), 2**31, "$(id)"),
]


def json_texts() -> dict[str, bytes]:
    """What is no JSON object, or hardly one."""
    return {
        "empty": b"",
        "text": b"hello\n",
        "cut": b'{"a": [1, ',
        "list": b"[]",
        "number": b"1",
        "string": b'"x"',
        "null": b"null",
        "nothing": b"{}",
        "deep lists": b'{"a": ' + b"[" * _MANY + b"]" * _MANY + b"}",
        "deep objects": b'{"a": ' * _MANY + b"1" + b"}" * _MANY,
        "open lists": b"[" * _MANY,
        "many lists": b'{"a": [' + b"[]," * 4_000_000 + b"1]}",
        "equal keys": b'{"model_type": "beit", "model_type": "beit"}',
        "NaN": b'{"layer_norm_eps": NaN, "format": Infinity}',
        "beyond floats": b'{"layer_norm_eps": 1e999}',
        "many digits": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
        "long key": b'{"' + b"k" * 10**6 + b'": 1}',
        "binary": bytes(range(256)) * 10,
        "byte order mark": b'\xef\xbb\xbf{"a": 1}',
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "zeros": bytes(10_000),
    }


def special() -> dict[str, Content]:
    """What is no regular file, or no file that a program should read to its end."""

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 42)

    return {
        "pipe": lambda path: os.mkfifo(path),
        "endless device": lambda path: path.symlink_to("/dev/zero"),
        "random device": lambda path: path.symlink_to("/dev/urandom"),
        "no device": lambda path: path.symlink_to("/dev/null"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to nothing": lambda path: path.symlink_to("/nothing/there"),
        "link to a secret": lambda path: path.symlink_to("/etc/passwd"),
        "folder": lambda path: path.mkdir(),
        "huge": sparse,
    }


def headers(valid: bytes) -> dict[str, bytes]:
    """Safetensors files with a hostile header, made of a valid file."""
    length = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    name = next(key for key in header if key != "__metadata__")

    def file(text: bytes, size: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if size is None else size) + text + data

    def changed(**entry: object) -> bytes:
        return file(json.dumps(header | {name: header[name] | entry}).encode())

    def added(key: str) -> bytes:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        return file(json.dumps(header | {key: empty}).encode())

    shapes = ([10**30], [2**62, 4], [-1], [0, 2**62], [1] * 1000, [1.5], ["1"], 3, None, [[]])
    made = {f"shape {shape}"[:40]: changed(shape=shape) for shape in shapes}
    made |= {f"header {key}": file(text) for key, text in json_texts().items()}
    made |= {f"size {size}": file(b"{}", size) for size in (0, 1, 2**31, 2**63, 2**64 - 1)}
    made |= {
        "offsets beyond": changed(data_offsets=[0, 2**40]),
        "offsets backwards": changed(data_offsets=[8, 0]),
        "offsets of 10^30": changed(data_offsets=[0, 10**30]),
        "dtype": changed(dtype="F4096"),
        "dtype list": changed(dtype=["F32"]),
        "entry list": file(json.dumps(header | {name: [1]}).encode()),
        "metadata list": file(json.dumps(header | {"__metadata__": [1]}).encode()),
        "metadata numbers": file(json.dumps(header | {"__metadata__": {"a": 1}}).encode()),
        "long name": added("n" * 10**6),
        "name of lines": added("a\nb\x1b[2J"),
        "name of a path": added("../../x"),
        "empty name": added(""),
    }
    for key, text in json_texts().items():
        if key not in ("many lists", "binary") and len(text) < 10**6:
            value = text.decode("latin-1")
            for entry in ("tokenizer", "timm", "beit_jax"):
                noted = header | {"__metadata__": {entry: value}}
                made[f"{entry} {key}"] = file(json.dumps(noted).encode())
    return made


class _Run:
    """Pickles as a call that would make a file, if anything were called."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class _Evaluate(_Run):
    def __reduce__(self):
        return eval, (f"open({str(self.canary)!r}, 'w')",)


def _dict_of(keys: list[bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(key + b"K\x01" for key in keys) + b"u."


def _long(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(name: str, arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


def _tensor(size: str, stride: str, count: str = "I1", more: bytes = b"") -> bytes:
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu")
    storage += f"{count}\n".encode() + b"tQ"
    numbers = [f"({''.join(f'I{n}' + chr(10) for n in text.split())}t" for text in (size, stride)]
    inner = b"(" + storage + b"K\x00" + "".join(numbers).encode() + b"\x89}" + more + b"t"
    return (
        b"\x80\x02}" + _text("cls_token") + _call("torch._utils._rebuild_tensor_v2", inner) + b"s."
    )


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that would run something, take for ever, or fill memory."""
    many = range(1, 100_000)
    endless = _call("__builtin__.range", _long(10**18) + b"\x85") + b"\x85"
    made = {
        "os.system": pickle.dumps(_Run(canary)),
        "eval": pickle.dumps({"model": _Evaluate(canary)}),
        "os.system beside weights": pickle.dumps({"model": {"a.b": 1}, "x": _Run(canary)}, 2),
        "posix.system": b"\x80\x04\x8c\x05posix\x8c\x06system\x93"
        + _text(f"touch {canary}")
        + b"\x85R.",
        "obj of os.system": b"(cos\nsystem\n" + _text(f"touch {canary}") + b"o.",
        "inst of os.system": b"(" + _text(f"touch {canary}") + b"ios\nsystem\n.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\n(cos\n__dict__\n" + _text("system") + b"tR.",
        "through a path": b"\x80\x04\x8c\x0bcollections\x8c\x12_sys.modules.clear\x93)R.",
        "dotted dict": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
        "lists": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        "tuples": b"\x80\x02)" + b"\x85" * 10**6 + b".",
        "a deep key": b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.",
        "a wide key": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
        "deep dicts": b"\x80\x02"
        + (b"}" + _text("model")) * 10**5
        + b"K\x01"
        + b"s" * 10**5
        + b".",
        "keys that collide": _dict_of([_long(i * _HASH) for i in many]),
        "many numbers": _dict_of([b"G" + struct.pack(">d", i * 2.0**61) for i in many]),
        "a set that collides": b"\x80\x04\x8f("
        + b"".join(_long(i * _HASH) for i in many)
        + b"\x90.",
        "set() that collides": b"\x80\x02c__builtin__\nset\n]("
        + b"".join(_long(i * _HASH) for i in many)
        + b"e\x85R.",
        "pairs that collide": b"\x80\x02ccollections\nOrderedDict\n]("
        + b"".join(_long(i * _HASH) + b"K\x01\x86" for i in many)
        + b"e\x85R.",
        "memo of 2^31": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
        "memo of 10^30": b"]p" + b"1" + b"0" * 30 + b"\n.",
        "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "bytearray of 2^50": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".",
        "text of 2^60": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",
        "a number of digits": b"I" + b"9" * 10**5 + b"\n.",
        "a large number": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        "range": b"\x80\x02" + _call("collections.OrderedDict", endless) + b".",
        "set of a range": b"\x80\x02" + _call("__builtin__.set", endless) + b".",
        "extension": b"\x80\x02\x82\x01.",
        "a buffer": b"\x80\x05\x97.",
        "no such opcode": b"\x80\x02\xff.",
        "no end": b"\x80\x02]",
        "state of a class": b"\x80\x02ctorch\nTensor\n}" + _text("__init__") + b"K\x01sb.",
        "a name of a million": b"c" + b"a" * 10**6 + b"\nb\n.",
        "a name of lines": b"\x80\x04" + _text("o\ns\x1b[2J") + _text("sys\ntem") + b"\x93.",
        "many names": b"".join(f"ctorch.optim\nA{i}\n0".encode() for i in range(50_000)) + b"N.",
        "many copies": b"\x80\x02(" + b"a" * 0 + _text("a") * 10**5 + b"lq\x00"
        + b"".join(b"0c__builtin__\nset\nh\x00\x85R" for _ in range(10**4)) + b".",
        "tensor of 10^30": _tensor(str(10**30), "1"),
        "tensor of one number": _tensor(f"{10**6} {10**6}", "0 0"),
        "negated tensor of one number": _tensor(
            f"{10**6} {10**6}", "0 0", more=b"}" + _text("neg") + b"\x88s"
        ),
        "negative size": _tensor("-1", "1"),
        "negative stride": _tensor("1", "-1"),
        "many dimensions": _tensor("1 " * 1000, "1 " * 1000),
        "none of 2^62": _tensor(f"0 {2**62}", "1 1"),
        "storage of 10^30": _tensor("1", "1", count=f"I{10**30}"),
        "storage of -1": _tensor("1", "1", count="I-1"),
    }  # fmt: skip
    wide = b"\x80\x02]q\x00" + b"".join(
        b"(" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 999 + b"lq" + bytes([i + 1])
        for i in range(30)
    )
    made["a thousand to the thirtieth"] = b"\x80\x02}" + _text("args") + wide[2:] + b"s."
    level = b"}q\x00" + _text("a") + b"K\x01s"
    for i in range(5):
        get = b"h" + bytes([i])
        level += (
            b"0}q"
            + bytes([i + 1])
            + b"("
            + b"".join(_text(f"k{j}") + get for j in range(1000))
            + b"u"
        )
    made["dicts of dicts of dicts"] = b"\x80\x02" + level + b"."
    itself = b"\x80\x02}q\x00(" + b"".join(_text(f"k{j}") + b"h\x00" for j in range(5000)) + b"u."
    made["a dict within itself"] = itself
    module = b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81q\x00}(" + _text("_modules") + b"}("
    module += _text("a") + b"h\x00" + _text("b") + b"h\x00u" + _text("_parameters") + b"}ub."
    made["a module within itself"] = module
    return made


def torch_zip(content: bytes, storage: bytes = bytes(4)) -> bytes:
    """A pickle in the container of torch.save."""
    return zip_of({"x/data.pkl": content, "x/data/0": storage, "x/version": b"3\n"})


def torch_stream(content: bytes) -> bytes:
    """A pickle in the older container."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps([], 2)


def zip_of(files: dict[str, bytes], *, kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def zips(valid: bytes) -> dict[str, bytes]:
    """Zip files around a valid file of weights, or around nothing good."""
    zeros = bytes(200 << 20)
    plain = zip_of({"a.pth": valid})
    return {
        "bomb": zip_of({"a.pth": zeros}, kind=zipfile.ZIP_DEFLATED),
        "bomb of torch.save": zip_of(
            {"x/data.pkl": b"\x80\x02}.", "x/data/0": zeros}, kind=zipfile.ZIP_DEFLATED
        ),
        "path upwards": zip_of({"../../escaped.pth": valid}),
        "absolute path": zip_of({"/tmp/escaped.pth": valid}),
        "path upwards in torch.save": zip_of({"../data.pkl": b"\x80\x02}.", "../data/0": b""}),
        "many files": zip_of({f"{i}.pth": b"" for i in range(20_000)}),
        "zip in a zip": zip_of({"a.zip": zip_of({"b.zip": plain})}),
        "locked": plain.replace(b"PK\1\2\x14\x03\x14\0\0", b"PK\1\2\x14\x03\x14\0\1"),
        "lying size": plain.replace(struct.pack("<I", len(valid)), struct.pack("<I", 2**31)),
        "cut": plain[: len(plain) // 2],
        "name of lines": zip_of({"a\nb\x1b[2J.pth": valid}),
        "name of 60,000": zip_of({"n" * 60_000 + ".pth": valid}),
        "no files": zip_of({}),
    }


def arrays() -> dict[str, bytes]:
    """`.npy` files that are none, or of more than they hold."""

    def npy(header: str, data: bytes = bytes(48)) -> bytes:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data

    shapes = ("(12,)", f"({10**30},)", f"({2**62},)", "(-1,)", "(3, 4)", "()", "(0,)", "12", "None")
    made = {
        f"npy {shape}": npy(f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}\n")
        for shape in shapes
    }
    ones = b"\xff" * 48
    kinds = ("|O", "<f4", "<U1", "<M8[s]", "|V4", "[('a', '<i4')]", "<i9", "x" * 1000)
    for kind in kinds:
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (12,), }}\n"
        made[f"npy {kind[:9]}"] = npy(text)
    return made | {
        "npy nested": npy("(" * 5000 + ")" * 5000),
        "npy code": npy("__import__('os').system('id')\n"),
        "npz": zip_of({"a.npy": npy("{}")}),
        "pickle": pickle.dumps([1, 2]),
        "negative": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (12,), }\n", ones),
    }  # fmt: skip
