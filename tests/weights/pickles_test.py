"""Files of torch.save are read without running code from them and without PyTorch."""

import builtins
import io
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from beit_jax.weights import pickles
from beit_jax.weights.report import WeightsError


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


@pytest.fixture(params=["zip", "legacy"])
def save(request, torch, tmp_path):
    """Writes an object with torch.save in either container; returns the path."""

    def write(whole, name="file.pth") -> str:
        path = tmp_path / name
        torch.save(whole, path, _use_new_zipfile_serialization=request.param == "zip")
        return str(path)

    return write


class Command:
    """An object whose unpickling runs a command."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_tensors_of_every_kind_are_read_exactly(torch, save):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    whole = {
        "model": {
            "matrix": base,
            "transposed": base.t(),
            "part": base[1:4, 2],
            "shared": base,
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(base[:2].clone()),
            "half": base.half(),
            "double": base.double(),
            "integers": torch.arange(7),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "flags": torch.tensor([True, False]),
        },
        "epoch": 7,
        "names": ["a", ("b", 2.5, None)],
    }
    read = pickles.load(save(whole))
    assert read["epoch"] == 7
    assert read["names"] == ["a", ("b", 2.5, None)]
    for name, tensor in whole["model"].items():
        expected = tensor.detach().numpy()
        assert read["model"][name].dtype == expected.dtype, name
        np.testing.assert_array_equal(read["model"][name], expected, err_msg=name)


def test_bfloat16_is_read(torch, save):
    values = torch.tensor([1.0, -2.5, 3.140625]).bfloat16()
    read = pickles.load(save({"x": values}))["x"]
    np.testing.assert_array_equal(read.astype(np.float32), [1.0, -2.5, 3.140625])


def test_objects_that_training_scripts_save_beside_weights_are_inert(torch, save):
    import argparse
    import collections

    whole = {
        "model": collections.OrderedDict(w=torch.ones(2)),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
    }
    read = pickles.load(save(whole))
    assert isinstance(read["args"], pickles.Record)
    assert read["args"].fields == {"lr": 0.1}
    assert read["size"] == (2, 3)
    np.testing.assert_array_equal(read["model"]["w"], [1, 1])


@pytest.mark.parametrize("name", ["os.system", "eval", "subprocess"])
def test_a_pickle_that_would_run_a_command_is_refused(save, tmp_path, name):
    """Refused by the name it needs, and the command has not run."""
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').close()"
    command, named = {
        "os.system": (Command(os.system, f"touch {trace}"), r"(posix|nt)\.system"),
        "eval": (Command(builtins.eval, code), r"__builtin__\.eval"),
        "subprocess": (
            Command(subprocess.call, ["touch", str(trace)]),
            r"(subprocess|commands)\.call",
        ),
    }[name]
    path = save({"model": {}, "harmless": command})
    with pytest.raises(WeightsError, match=f"refused: it names {named}") as error:
        pickles.load(path)
    one_line(error)
    assert not trace.exists()


def test_the_same_pickles_run_code_in_an_ordinary_unpickler(tmp_path):
    """So that the test above could fail."""
    trace = tmp_path / "ran"
    pickle.loads(pickle.dumps(Command(os.system, f"touch {trace}")))
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_of_any_protocol_do_not_run(tmp_path, protocol):
    trace = tmp_path / "ran"
    path = tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Command(os.system, f"touch {trace}"), protocol=protocol))
    # Protocol 0 is text; it is refused as such.
    with pytest.raises(WeightsError, match=r"it names posix\.system|is a text file"):
        pickles.load(str(path))
    assert not trace.exists()


def test_dotted_names_do_not_reach_into_allowed_modules(tmp_path):
    """`collections.OrderedDict.fromkeys`-like paths are names of their own, not on the list."""
    payload = b"\x80\x04\x8c\x0bcollections\x8c\x10_sys.modules.get\x93."
    with pytest.raises(WeightsError, match=r"refused: it names collections\._sys\.modules\.get"):
        pickles.loads(payload, source="file.pth")


def test_a_tensor_cannot_reach_outside_its_storage(torch, tmp_path):
    """Sizes in a pickle are only claims; a view beyond the numbers would read foreign memory."""
    good = tmp_path / "good.pth"
    torch.save({"x": torch.zeros(4)}, good)
    with zipfile.ZipFile(good) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = "good/data.pkl"
    # K\x04\x85 is the shape (4,): claim 200 numbers.
    assert files[name].count(b"K\x04\x85") == 1
    files[name] = files[name].replace(b"K\x04\x85", b"K\xc8\x85")
    bad = tmp_path / "bad.pth"
    with zipfile.ZipFile(bad, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    with pytest.raises(WeightsError, match=r"shape \(200,\) ends behind its 4 numbers"):
        pickles.load(str(bad))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file(torch, save, share):
    path = pathlib.Path(save({"model": {"w": torch.randn(300, 30)}}))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="is damaged or cut off") as error:
        pickles.load(str(path))
    assert str(path) in one_line(error)


def test_flipped_bytes_never_crash(torch, tmp_path):
    """Random damage either gives a WeightsError or a file that can still be read."""
    buffer = io.BytesIO()
    whole = {"model": {"w": torch.arange(6.0)}, "n": [1, 2]}
    torch.save(whole, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] = rng.integers(256)
        try:
            pickles.loads(bytes(damaged), source="x")
        except WeightsError:
            failed += 1
    assert failed > 100


def test_the_error_for_a_text_file_explains_the_wget_mistake(tmp_path):
    path = tmp_path / "encoder.pkl"
    path.write_text(
        "--2026-01-01 12:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\n"
        "Resolving cdn.openai.com... connected.\nHTTP request sent, awaiting response... 200 OK\n"
    )
    with pytest.raises(WeightsError, match="is a text file, not weights") as error:
        pickles.load(str(path))
    text = one_line(error)
    assert "--2026-01-01 12:00:00--" in text
    assert "wget -O encoder.pkl" in text


def test_other_files_are_refused(torch, tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        pickles.load(str(tmp_path / "nothing.pth"))
    with pytest.raises(WeightsError, match="is a folder"):
        pickles.load(str(tmp_path))
    empty = tmp_path / "empty.pth"
    empty.touch()
    with pytest.raises(WeightsError, match="is empty"):
        pickles.load(str(empty))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    with pytest.raises(WeightsError, match=r"not one of torch\.save"):
        pickles.load(str(tmp_path / "x.zip"))
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(WeightsError, match=r"not one of torch\.save"):
        pickles.load(str(tmp_path / "list.pkl"))


def test_a_pickle_needs_no_pytorch_to_be_read(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.arange(3.0)}}, path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from beit_jax.weights import pickles\n"
        f"print(pickles.load({str(path)!r})['model']['w'].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[0.0, 1.0, 2.0]", result.stderr
