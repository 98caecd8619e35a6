"""`beit-jax`: every sub-command is listed, and is the module that it stands for."""

import importlib
import types

import pytest

from beit_jax import __version__, cli
from tests.absent import run_without
from tests.weights import examples


def test_help_lists_every_command_in_one_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [name]] == [
            command.summary
        ]
    assert max(map(len, lines)) <= 100


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("arguments", [[], ["exprot"]])
def test_an_unknown_command_is_an_error_that_lists_the_known(arguments, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "convert-tokenizer" in error
    assert ("no command 'exprot'" in error) == bool(arguments)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_passes_its_arguments_on(name, monkeypatch):
    command, given = cli.COMMANDS[name], []

    def fake(module):
        assert module == command.module
        return types.SimpleNamespace(main=lambda arguments: given.extend(arguments))

    monkeypatch.setattr(importlib, "import_module", fake)
    assert cli.main([name, "--some", "thing"]) == 0
    assert given == [*command.prefix, "--some", "thing"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert name in capsys.readouterr().out


def test_inspect_and_export_work_by_this_name_too(tmp_path, capsys):
    examples.saved(tmp_path / "run", examples.PRETRAINED["beit+"])
    output = str(tmp_path / "exported.safetensors")
    source = str(tmp_path / "run")
    assert cli.main(["export", source, "--format=timm", f"--output={output}"]) == 0
    assert cli.main(["inspect", output]) == 0
    assert "format: timm" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_command_says_which_extra_it_needs():
    program = """
from beit_jax import cli
import sys
sys.stderr = sys.stdout
print(cli.main(["prepare", "--help"]))
"""
    line, code = run_without(["tensorflow"], program).splitlines()
    assert line == (
        "error: prepare needs tensorflow, which is not installed: pip install 'beit-jax[train]'"
    )
    assert code == "2"


def test_help_imports_neither_jax_nor_numpy():
    program = """
import sys
from beit_jax import cli
cli.main(["--help"])
assert not {"jax", "numpy", "absl"} & set(sys.modules)
"""
    assert "export" in run_without([], program)
