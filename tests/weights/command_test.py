"""`python -m beit_jax.weights`, with and without PyTorch."""

import json
import os
import subprocess
import sys

import pytest

from beit_jax.weights.__main__ import main
from tests.weights import examples

PRETRAINED = examples.PRETRAINED["beit+"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "native"
    examples.saved(path, PRETRAINED)
    return str(path)


CONVERSION = ("--per-block", "--sha256", "--normalization", "--heads", "--epsilon", "--weights")


@pytest.mark.parametrize("command", ["export", "import"])
def test_both_directions_take_the_same_flags(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [flag for flag in CONVERSION if flag not in text] == []
    assert ("writing takes PyTorch" in text) == (command == "export")


def test_export_of_a_foreign_file_takes_what_import_takes(checkpoint, tmp_path, capsys):
    """One step gives the very file that two give."""
    folder, flags = str(tmp_path / "hf"), ["--per-block", "--epsilon=1e-5", "--image-size=64"]
    assert main(["export", checkpoint, "--format=hugging_face", f"--output={folder}"]) == 0
    assert main(["import", folder, f"--output={tmp_path / 'ours'}", *flags]) == 0
    for source, name, given in ((folder, "one", flags), (str(tmp_path / "ours"), "two", [])):
        output = str(tmp_path / name)
        assert main(["export", source, "--format=hugging_face", f"--output={output}", *given]) == 0
    capsys.readouterr()
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two, file
    assert json.loads((tmp_path / "one" / "config.json").read_text())["layer_norm_eps"] == 1e-5
    error = [folder, "--format=timm", f"--output={tmp_path / 'x.safetensors'}", "--epsilon=1e-5"]
    assert main(["export", *error]) == 2
    assert "layer_norm_epsilon 1e-06, this checkpoint 1e-05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["export", "import", "convert-tokenizer", "inspect"]),
        (["export"], ["hugging_face", "timm", "unilm", "--allow-unused", "PyTorch"]),
        (["import"], ["--image-size", "--per-block", "--allow-missing", "init_from"]),
        (["convert-tokenizer"], ["wget -O encoder.pkl", "--encoder-sha256", "FLAVA"]),
        (["inspect"], ["SHA-256"]),
    ],
)
def test_help(command, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_export_import_inspect(checkpoint, tmp_path, capsys):
    folder, again = str(tmp_path / "hf"), str(tmp_path / "again")
    assert main(["export", checkpoint, "--format=hugging_face", f"--output={folder}"]) == 0
    text = capsys.readouterr().out
    assert "used (26): " in text
    assert "missing (0): none\nunused (0): none\nreshaped (0): none" in text
    assert f"transformers.BeitForMaskedImageModeling.from_pretrained('{folder}')" in text
    assert main(["import", folder, f"--output={again}", "--image-size=64", "--per-block"]) == 0
    text = capsys.readouterr().out
    assert "SHA-256 " in text
    assert "reshaped (2): encoder/relative_position_bias/table → " in text
    assert "(3, 84, 4) → (3, 228, 4)" in text
    assert "positions relative_per_block" in text
    for source, words in (
        (checkpoint, ["format: beit_jax", "masked image modelling, 40 tokens", "lm_head/kernel"]),
        (folder, ["format: hugging_face", "SHA-256", "layer.2.lambda_1  float32 (32,)"]),
        (again, ["image 64"]),
    ):
        assert main(["inspect", source]) == 0
        text = capsys.readouterr().out
        for word in words:
            assert word in text, (source, word)


def test_errors_are_one_line_and_code_2(checkpoint, tmp_path, capsys):
    for arguments, words in (
        (["export", "/nowhere", "--format=timm", "--output=x.safetensors"], "no checkpoint in"),
        (["export", checkpoint, "--format=timm", "--output=x.pth"], "must end in .safetensors"),
        (["import", "/nowhere.pth", f"--output={tmp_path}/x"], "/nowhere.pth does not exist"),
        (["inspect", "/nowhere.pth"], "does not exist"),
        (["convert-tokenizer", "--encoder=/no.pkl", "--output=x.safetensors"], "does not exist"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_without_pytorch_everything_but_writing_pth_works(checkpoint, tmp_path):
    """In a process where `import torch` and `import tensorflow` fail."""
    script = f"""
import json, sys
sys.modules["torch"] = sys.modules["tensorflow"] = None
from beit_jax.weights.__main__ import main
codes = [
    main(["export", {checkpoint!r}, "--format=hugging_face", "--output=hf"]),
    main(["export", {checkpoint!r}, "--format=timm", "--output=timm.safetensors"]),
    main(["import", "hf", "--output=from_hf"]),
    main(["import", "timm.safetensors", "--output=from_timm"]),
    main(["export", {checkpoint!r}, "--format=unilm", "--output=x.pth"]),
]
print(json.dumps(codes))
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [0, 0, 0, 0, 2]
    assert "writing a .pth file takes PyTorch, which is not installed" in result.stderr
    assert not (tmp_path / "x.pth").exists()
