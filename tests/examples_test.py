"""The notebooks in examples/ are valid, hold no outputs, and run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_hold_no_outputs(path):
    """Of nbformat 4.5's rules, those that a person editing the JSON could break."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert isinstance(cell["metadata"], dict)
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), str(path), "exec")


@pytest.mark.slow
def test_the_notebook_runs_on_a_quickstart_run(tmp_path):
    """All cells in order, as a kernel runs them, on a run of a few steps."""
    command = [sys.executable, "main.py", "--config=tests/tasks/tiny.py:story"]
    subprocess.run([*command, f"--workdir={tmp_path}"], cwd=ROOT, check=True, timeout=900)
    program = tmp_path / "notebook.py"
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program.write_text("\n\n".join(sources))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT / "examples",
        env={**os.environ, "BEIT_JAX_RUN": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    # Chance is one in six textures; every block has its accuracy; masked tokens were predicted.
    lines = done.stdout.splitlines()
    assert "chance    16.7%" in lines
    assert [line.split()[1] for line in lines if line.startswith("block ")] == ["1", "2"]
    assert lines[-1].endswith("% of the masked tokens are right")
