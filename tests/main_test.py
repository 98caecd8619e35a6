"""Bad input on the command line is one line and exit code 2, before anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*arguments, workdir):
    return subprocess.run(
        [sys.executable, "main.py", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=tests/tasks/tiny.py", "--config.run.stepz=3"], "stepz"),
        (["--config=tests/tasks/tiny.py", "--config.run.steps=many"], "many"),
        (["--config=tests/tasks/tiny.py", "--config.run.batch_size=12"], "batch_size: 12 does not"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (
            ["--config=tests/tasks/tiny.py", "--config.data.source=folder:/nowhere"],
            "config.data.source: ",
        ),
        (["--config=configs/beit_base.py", "--config.run.batch_size=8"], "dalle.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    result = call(*arguments, workdir=workdir)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (["--platform=cpu"], {}, True),
        ([], {"JAX_PLATFORMS": "cpu"}, True),
        ([], {"JAX_PLATFORMS": ""}, False),
        (["--platform=tpu"], {"JAX_PLATFORMS": "tpu,cpu"}, False),
    ],
)
def test_a_run_counts_as_cpu_only_if_it_is_certain(tmp_path, flags, environment, expected):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu/__init__.py").touch()
    code = f"import main; main.flags.FLAGS(['main.py', *{flags}]); print(main._only_cpu())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(expected), done.stderr
