"""How to add a format of weights: one module and one row; nothing in the package is edited.

`TOY` is a whole format, a NumPy archive. In the package it would be `formats/toy.py` and a row in
`formats/__init__.py`; from outside the row is set before the command line is parsed.
"""

import io
import json
import re

import numpy as np
import pytest

from beit_jax.files import write_whole
from beit_jax.weights import convert
from beit_jax.weights.__main__ import main
from beit_jax.weights.description import describe, to_config
from beit_jax.weights.formats import (
    FORMATS,
    Described,
    Export,
    Format,
    Opened,
    Reader,
    Stated,
    Written,
)
from beit_jax.weights.keys import LINEAR, row, to_foreign, weight_and_bias
from beit_jax.weights.report import WeightsError
from tests.weights import examples

PRETRAINED = examples.PRETRAINED["beit+"]


def table(description):
    """Every parameter under its own name, and the head as PyTorch lays it out."""
    head = ("lm_head/kernel", "lm_head/bias")
    same = [row(f"beit_jax/{name}", name) for name in description.shapes() if name not in head]
    return (*same, *weight_and_bias("tokens", "lm_head", LINEAR))


def write(export: Export) -> Written:
    state = to_foreign(export.params, table(export.description))
    buffer = io.BytesIO()
    config = json.dumps(to_config(export.description))
    np.savez(buffer, toy_config=np.array(config), **state)
    write_whole(export.output, buffer.getvalue())
    return Written(load=f"numpy.load({export.output!r})", used=tuple(export.params))


def load(content: bytes, path: str):
    archive = dict(np.load(io.BytesIO(content)))
    return archive, {"toy": str(archive.pop("toy_config"))}


def detect(opened: Opened) -> bool:
    return "toy" in opened.metadata


def describe_toy(opened: Opened, *, stated: Stated) -> Described:
    return Described(description=describe(json.loads(opened.metadata["toy"])))


TOY = Format(
    name="toy",
    help="a NumPy archive",
    suffix=".npz",
    write=write,
    reader=Reader(detect=detect, describe=describe_toy, table=table, load=load),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", TOY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "native"
    return str(path), examples.saved(path, PRETRAINED)


def test_export_and_import_as_functions(toy, checkpoint, tmp_path):
    source, params = checkpoint
    output = str(tmp_path / "toy.npz")
    done = convert.export_checkpoint(source, format="toy", output=output)
    assert set(done.report.used) == set(params)
    assert np.load(output)["tokens.weight"].shape == (40, 32)
    report, description, _ = convert.import_checkpoint(output, output=str(tmp_path / "again"))
    assert description == PRETRAINED
    assert not report.missing
    assert not report.unused
    again, *_ = convert.read_any(str(tmp_path / "again"))
    for name, array in params.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # Another format's writer takes it, as does `config.run.init_from`.
    timm = str(tmp_path / "x.safetensors")
    assert convert.export_checkpoint(output, format="timm", output=timm).report.used


def test_export_import_and_inspect_on_the_command_line(toy, checkpoint, tmp_path, capsys):
    source, _ = checkpoint
    output = str(tmp_path / "toy.npz")
    assert main(["export", source, "--format=toy", f"--output={output}"]) == 0
    assert f"numpy.load('{output}')" in capsys.readouterr().out
    assert main(["inspect", output]) == 0
    text = capsys.readouterr().out
    assert "format: toy" in text
    assert "masked image modelling, 40 tokens" in text
    assert main(["import", output, f"--output={tmp_path / 'again'}"]) == 0
    assert main(["export", source, "--format=toy", "--output=x.zip"]) == 2
    assert "--output: x.zip must end in .npz" in capsys.readouterr().err


def test_help_and_errors_list_it(toy, capsys):
    for command in ("export", "import"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert re.search(r"toy +a NumPy archive", capsys.readouterr().out)
    with pytest.raises(
        ValueError, match=r"must be one of hugging_face_beit, hugging_face, timm.*toy; got 'x'"
    ):
        convert.export_checkpoint("runs/x", format="x", output="x")


def test_reading_is_strict(toy, checkpoint, tmp_path):
    source, _ = checkpoint
    output = str(tmp_path / "toy.npz")
    convert.export_checkpoint(source, format="toy", output=output)
    archive = dict(np.load(output))
    del archive["tokens.bias"]
    np.savez(output, extra=np.zeros(2, np.float32), **archive)
    with pytest.raises(WeightsError, match=r"missing tokens\.bias; unused extra"):
        convert.read_any(output)


def test_a_format_may_be_write_only(toy, checkpoint, monkeypatch, tmp_path, capsys):
    source, _ = checkpoint
    output = str(tmp_path / "toy.npz")
    written = Format(name="toy", help="a NumPy archive", suffix=".npz", write=write)
    monkeypatch.setitem(FORMATS, "toy", written)
    assert main(["export", source, "--format=toy", f"--output={output}"]) == 0
    with pytest.raises(WeightsError, match="the format toy can be written, not read"):
        convert.read_any(output)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert "toy" not in capsys.readouterr().out


def test_without_its_row_the_format_is_unknown(checkpoint, tmp_path):
    source, _ = checkpoint
    with pytest.raises(ValueError, match="format: must be one of"):
        convert.export_checkpoint(source, format="toy", output=str(tmp_path / "x.npz"))
