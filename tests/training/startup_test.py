"""The folder of the compilation cache, and the time to the first step by phases."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from beit_jax.config import ConfigError
from beit_jax.training import startup
from tests.distributed.processes import losses, values

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def settings():
    """Puts JAX's own setting back."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    startup.compilation_cache.reset_cache()


def test_where_programs_are_kept(settings, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    at_home = startup.keep_compiled(
        "auto", workdir=workdir, environment={"XDG_CACHE_HOME": str(tmp_path)}
    )
    assert Path(at_home).parent == tmp_path / "beit_jax/compiled"
    assert Path(at_home).name.startswith("cpu_")  # one for each kind of processor
    assert Path(at_home).stat().st_mode & 0o077 == 0
    assert jax.config.jax_compilation_cache_dir == at_home
    assert Path(startup.keep_compiled(str(tmp_path / "x"), workdir=workdir)).parent.name == "x"
    remote = startup.keep_compiled("auto", workdir="gs://bucket/run", environment={})
    assert remote.startswith("gs://bucket/run/compiled/cpu_")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shared = startup.keep_compiled("auto", workdir=workdir, environment={})
    assert shared.startswith(f"{workdir}/compiled/cpu_")
    # What the user said elsewhere holds.
    said = {"JAX_COMPILATION_CACHE_DIR": "/somewhere"}
    assert startup.keep_compiled("auto", workdir=workdir, environment=said) == ""
    assert startup.keep_compiled("", workdir=workdir, environment={}) == ""
    assert jax.config.jax_compilation_cache_dir == shared


def test_a_folder_that_can_not_be_written_is_a_warning(settings, tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    assert startup.keep_compiled(str(tmp_path / "file/folder"), workdir="w") == ""
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("setting", ["https://host/a", "s3://bucket/a"])
def test_an_address_that_jax_can_not_write_to_is_refused(settings, tmp_path, setting):
    with pytest.raises(ConfigError, match=r"^config\.run\.compilation_cache: .* nor gs://$"):
        startup.keep_compiled(setting, workdir=str(tmp_path))


def test_times_add_up():
    startup.Startup()  # has the time since the process' start
    timer = startup.Startup()
    time.sleep(0.02)
    timer.done("data")
    timer.done("state")
    time.sleep(0.01)
    timer.done("data")
    seconds = timer.finish()
    assert list(seconds) == ["data", "state", "total"]
    assert seconds["data"] >= 0.03 > seconds["state"]
    assert seconds["total"] == pytest.approx(seconds["data"] + seconds["state"])


def test_the_first_timer_starts_where_the_program_says(monkeypatch):
    monkeypatch.setattr(startup.Startup, "_process_taken", False)
    monkeypatch.setattr(startup.Startup, "process_began", None)
    startup.count_from(time.perf_counter() - 5.0)
    first = startup.Startup().finish()
    assert first["start"] == first["total"] == pytest.approx(5.0, abs=0.5)
    assert startup.Startup().finish() == {"total": 0.0}


@pytest.mark.slow
def test_a_launcher_that_execs_python_is_not_counted(tmp_path):
    """The kernel keeps a process' start time over exec: three seconds of shell are not "start"."""
    (tmp_path / "regression.py").write_text(
        "from ml_collections import ConfigDict\n"
        "from tests.distributed.processes import values\n"
        "def get_config():\n    return ConfigDict(values(run__steps=1))\n"
    )
    program = (
        "import sys; sys.modules['clu'] = None; import main; from beit_jax import jobs;"
        "from tests.distributed import worker as w;"
        "jobs.JOBS['regression'] = (w.RegressionConfig, w.run);"
        f"main._parse_flags(['main', '--config={tmp_path}/regression.py',"
        f" '--workdir={tmp_path}/run']); main.main(['main']);"
        "from beit_jax.training import startup;"
        "print('age', startup._process_age())"
    )
    began = time.perf_counter()
    done = subprocess.run(
        ["sh", "-c", f'sleep 3; exec {sys.executable} -c "$0"', program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    waited = time.perf_counter() - began
    line = next(line for line in done.stderr.splitlines() if "first step after" in line)
    assert float(line.split("first step after ")[1].split(" s")[0]) < waited - 3
    assert float(done.stdout.split("age ")[1]) > 3


def test_the_age_of_this_process():
    age = startup._process_age()
    time.sleep(0.1)
    assert startup._process_age() - age == pytest.approx(0.1, abs=0.09)
    assert 0 <= age < 1e5


@pytest.mark.slow
def test_the_second_start_reads_its_step(tmp_path):
    """The same run twice: the numbers are the same, and the step isn't compiled again."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    said = []
    for name in ("first", "second"):
        asked = {"values": values(run__steps=3), "workdir": str(tmp_path / name), "cluster": {}}
        done = subprocess.run(
            [sys.executable, "-m", "tests.distributed.worker", json.dumps(asked)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stderr)
    assert list((tmp_path / "cache/beit_jax/compiled").glob("cpu_*/jit_train_step-*"))
    first, second = (
        next(line for line in text.splitlines() if "compiled the train step" in line)
        for text in said
    )
    assert "compilation cache" not in first
    assert second.endswith("read from the compilation cache")
    assert "first step after" in said[1]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
