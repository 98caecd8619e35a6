"""The soak's parts exist, and its table and exit code say what did not survive."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.faults.row import Row

ROOT = Path(__file__).parent.parent.parent
BENCH = ROOT / "bench"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("soak")


def test_every_part_has_a_module_and_a_test(soak):
    for name in soak.PARTS:
        assert callable(importlib.import_module(f"tests.faults.{name}").soak)
        assert (ROOT / "tests" / "faults" / f"{name}_test.py").is_file()


def test_no_part_at_all_is_refused(soak, monkeypatch, capsys):
    """An empty table with exit code 0 would look like a success."""
    monkeypatch.setattr(sys, "argv", ["soak.py", "--parts="])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 2
    assert "--parts: names none" in capsys.readouterr().err


def test_a_fault_that_was_not_survived_is_named_and_ends_with_1(
    soak, monkeypatch, capsys, tmp_path
):
    def some(*, count, seed, folder):
        assert folder.is_dir()
        return Row(part="some", tried=count, survived=count - 1, failures=(f"seed {seed}: lost",))

    monkeypatch.setitem(sys.modules, "tests.faults.some", types.SimpleNamespace(soak=some))
    monkeypatch.setattr(soak, "PARTS", {"some": 40})
    monkeypatch.setattr(
        sys, "argv", ["soak.py", "--scale=0.1", "--seed=3", f"--json={tmp_path / 'soak.json'}"]
    )
    with pytest.raises(SystemExit) as end:
        soak.main()
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert "seed 3: lost" in out
    assert "| some | 4 | 3 |" in out
    assert (tmp_path / "soak.json").is_file()


def test_an_unknown_part_is_refused():
    done = subprocess.run(
        [sys.executable, "bench/soak.py", "--parts=nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no part nothing" in done.stderr
