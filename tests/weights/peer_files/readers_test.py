"""One reader is behind every entry point: what one takes all take, with the same parameters."""

import re

import numpy as np
import pytest

import beit_jax
from beit_jax.models.functional import flatten, unflatten
from beit_jax.weights import convert, foreign
from beit_jax.weights.__main__ import main
from beit_jax.weights.description import sentence
from tests.weights.peer_files.row import Accepted
from tests.weights.peer_files.table import ROWS

CONTAINERS = [
    pytest.param(row, id=row.name, marks=() if row.fast else pytest.mark.slow)
    for row in ROWS.values()
    if row.container
]


def same(found, expected) -> None:
    """Two flat trees of parameters are equal bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)


def command(capsys, *arguments: str) -> str:
    """A command that must succeed; returns what it printed."""
    capsys.readouterr()
    code = main(list(arguments))
    output = capsys.readouterr()
    assert not output.err, output.err
    assert code == 0
    return output.out


@pytest.mark.parametrize("row", CONTAINERS)
def test_every_entry_point_reads_the_same_parameters(row, peer, tmp_path, capsys):
    path = peer.ask("build", row=row.name, folder=str(tmp_path))["path"]
    assert isinstance(row.outcome, Accepted)
    checkpoint = foreign.read(path)
    description = checkpoint.description
    shapes = {name: leaf.shape for name, leaf in description.shapes().items()}
    assert {name: array.shape for name, array in checkpoint.params.items()} == shapes

    command(capsys, "import", path, "--output", str(tmp_path / "native"))
    imported = convert.read_any(str(tmp_path / "native"))
    same(imported.params, checkpoint.params)
    assert imported.description == description

    command(
        capsys, "export", path, "--format", "hugging_face", "--output", str(tmp_path / "exported")
    )
    same(foreign.read(str(tmp_path / "exported")).params, checkpoint.params)

    shown = command(capsys, "inspect", path)
    assert sentence(description) in shown
    assert re.search(f"format: {checkpoint.format}", shown)
    assert re.search(f"SHA-256: {checkpoint.sha256}", shown)

    started = convert.restore_params(path, shapes=unflatten(description.shapes()))
    same(flatten(started), checkpoint.params)

    loaded = {
        "classify": beit_jax.load_classifier,
        "pretrain": beit_jax.load_masked_image_model,
        "encoder": beit_jax.load_encoder,
    }[description.task](path)
    same(flatten(loaded.params), checkpoint.params)
    encoder = beit_jax.load_encoder(path)
    of_encoder = {k: v for k, v in checkpoint.params.items() if k.startswith("encoder/")}
    same(flatten({"encoder": encoder.params}), of_encoder)
    assert loaded.description.normalization == description.normalization


def test_every_kind_of_container_is_run():
    """The rows of `CONTAINERS` have each of the libraries' containers."""
    names = {row.name for row in ROWS.values() if row.container}
    for kind in (
        "sharded",
        "Lightning",
        "DeepSpeed",
        "zip",
        "compiled",
        ".pth.tar",
        "timm: a folder",
        "Accelerate",
    ):
        assert any(kind in name for name in names), kind
