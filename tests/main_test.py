"""Bad input on the command line is one line and exit code 2, before anything is written."""

import os
import signal
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


# Flags, and how the one line about them begins.
REFUSED = (
    ("--config.run.nothing=1", "config.run.nothing: no such setting in the config file"),
    ("--config.nothing.at.all=1", "config.nothing.at.all: no such setting in the config file"),
    ("--config.run[0]=1", "config.run[0]: no such setting in the config file"),
    ("--config.run=1", "flag --config.run=1: Failed to parse"),
    ("--config.run.steps=", "flag --config.run.steps=: invalid literal"),
    ("--config.run.steps=1e3", "flag --config.run.steps=1e3: invalid literal"),
    ("--config.run.steps=" + "9" * 10_000, "flag --config.run.steps=" + "9" * 80 + "...: "),
    ("--config.run." + "x" * 1000 + "=1", "config.run.x"),
    ("--config.=1", "Could not parse"),
    ("--workdir=", "--workdir: is empty"),
    ("--workdir= ", "--workdir: is empty"),
    ("--nothing", "Unknown command line flag 'nothing'"),
)


def test_a_wrong_flag_is_one_short_line_that_names_it(tmp_path):
    """Each in a fork of one process: absl's flags are global."""
    (tmp_path / "small.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'run': {'steps': 1}})\n"
    )
    code = f"""
import os, sys, main
for flag, _ in {REFUSED}:
    if not os.fork():
        print("next", flush=True)
        sys.argv = ["main.py", "--config={tmp_path}/small.py", flag]
        main._parse_flags(sys.argv)
        os._exit(0)
    _, status = os.wait()
    print("status", os.waitstatus_to_exitcode(status), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = [part.splitlines() for part in done.stdout.split("next\n")[1:]]
    assert len(found) == len(REFUSED), done.stdout
    for (flag, begins), lines in zip(REFUSED, found, strict=True):
        assert lines[0].startswith(f"error: {begins}"), (flag, lines)
        assert len(lines[0]) < 400, flag
        assert lines[1:] == ["status 2"], (flag, lines)


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


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_before_there_is_a_run_is_one_line(tmp_path, name, code):
    """It comes while the config file is being read, which is as long as imports take."""
    config = tmp_path / "config.py"
    config.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    done = subprocess.run(
        [sys.executable, "main.py", f"--workdir={tmp_path / 'run'}", f"--config={config}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # In a shell's background job, where tests may run, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == code
    assert done.stderr.endswith("before the run began; the same command starts it\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
