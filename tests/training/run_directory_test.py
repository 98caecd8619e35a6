"""A run's directory: what can't be one, and what in it is not this program's, is one line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from beit_jax.config import ConfigError, RunConfig
from beit_jax.training import run_directory
from beit_jax.training.checkpoint import Checkpoints
from beit_jax.training.state import state_from_params
from beit_jax.weights import native

ROOT = Path(__file__).parent.parent.parent
CONFIG = {"task": "pretrain", "run": {"steps": 10}}
RUN = RunConfig(steps=10, batch_size=8, keep_checkpoints=2)


def refused(workdir):
    """The line that refuses this directory."""
    with pytest.raises(ConfigError) as raised:
        run_directory.check_path(str(workdir))
    line = str(raised.value)
    assert line.startswith("--workdir: ")
    assert len(line.splitlines()) == 1
    assert len(line) < 300
    line.encode()
    return line


def test_a_path_that_can_hold_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "file").endswith("file: it is a file, not a folder")
    assert refused(tmp_path / "file/run").endswith("file is a file, not a folder")
    assert refused(tmp_path / "file/a/b/run").endswith("file is a file, not a folder")
    assert refused(tmp_path / "pipe").endswith("it is a file, not a folder")
    assert refused(tmp_path / "dangling").endswith("dangling is a link to nothing")
    assert refused(tmp_path / "dangling/run").endswith("dangling is a link to nothing")
    assert "symbolic links" in refused(tmp_path / "circle")
    assert "name too long" in refused(tmp_path / ("x" * 256))
    assert "the path is too long" in refused(tmp_path / "/".join(["x" * 200] * 20))
    assert "not UTF-8" in refused(f"{tmp_path}/" + os.fsdecode(b"caf\xe9"))
    assert "can't be printed" in refused(f"{tmp_path}/a\nb")
    assert "can't be printed" in refused(f"{tmp_path}/a\0b")
    assert "is empty" in refused("  ")
    assert "gs://BUCKET" in refused("s3://bucket/run")
    assert "gs://BUCKET" in refused("gs://")
    assert not (tmp_path / "nowhere").exists()


def test_a_path_that_can_hold_one_is_left_alone(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for path in ("run", "a/b/c/run", "link", "link/run", "ü ñ 図", "x" * 200):
        run_directory.check_path(str(tmp_path / path))
    run_directory.check_path("gs://bucket/run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert refused(tmp_path).endswith("it may not be written to")
    assert refused(tmp_path / "a/b").endswith(f"{tmp_path} may not be written to")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--plan=v4-8",)])
def test_the_command_says_so_in_one_line_with_exit_code_2(tmp_path, extra):
    (tmp_path / "file").write_text("")
    paths = (b"file", b"file/run", b"x" * 300, b"caf\xe9")
    for path in paths[: 1 if extra else None]:
        result = subprocess.run(
            [
                sys.executable,
                "main.py",
                "--config=tests/tasks/tiny.py",
                b"--workdir=" + os.fsencode(tmp_path) + b"/" + path,
                *extra,
            ],
            cwd=ROOT,
            capture_output=True,
            timeout=300,
        )
        assert result.returncode == 2, result.stderr
        assert b"Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith(b"error: --workdir: ")


def with_checkpoint(workdir):
    """A run's directory with one checkpoint."""
    checkpoints = Checkpoints(str(workdir), run=RUN, config=CONFIG)
    checkpoints.write_config()
    state = state_from_params({"head": {"bias": jnp.zeros(1)}}, optimizer=optax.identity())
    checkpoints.save(state, step=2)
    checkpoints.close()


DAMAGE = {
    "cut off": json.dumps(CONFIG)[:20].encode(),
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "of another program": b'{"model_type": "beit"}',
}
BLANK = {"empty": b"", "zeros": b"\0" * 512, "blanks": b" \n"}


@pytest.mark.parametrize("name", run_directory.OWN)
@pytest.mark.parametrize("damage", [*DAMAGE, *BLANK])
def test_a_damaged_file_is_refused_or_moved_aside_and_never_lost(tmp_path, caplog, name, damage):
    """Refused where there are no checkpoints that say that this is a run; an empty file never."""
    content = {**DAMAGE, **BLANK}[damage]
    (tmp_path / name).write_bytes(content)
    if damage in DAMAGE:
        refusal = pytest.raises(ConfigError, match=rf"^--workdir: .*{name} .*another --workdir$")
        with refusal, run_directory.opened(str(tmp_path)):
            pass
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]
        (tmp_path / name).unlink()
        with_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.ERROR), run_directory.opened(str(tmp_path)):
        pass
    (aside,) = tmp_path.glob(f"{name}.damaged-*")
    assert aside.read_bytes() == content
    assert aside.name in caplog.text
    if name == "config.json" and damage in DAMAGE:
        assert json.loads((tmp_path / name).read_text()) == CONFIG
        assert "made again from the newest checkpoint" in caplog.text


@pytest.mark.parametrize("name", [*run_directory.OWN, *run_directory.LOGS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_in_a_files_place_is_refused(tmp_path, name, kind):
    with_checkpoint(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    refusal = pytest.raises(ConfigError, match=rf"^--workdir: .*{name} (is|can't) .*another --work")
    with refusal, run_directory.opened(str(tmp_path)):
        pass
    assert not (tmp_path / "run.lock").exists()


def test_folders_of_somebody_else_are_refused(tmp_path):
    """The checkpoints of another program would be deleted, as this run's old ones are."""
    (tmp_path / "a/checkpoints/100").mkdir(parents=True)
    (tmp_path / "a/checkpoints/100/model.pt").write_bytes(b"weights")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/checkpoints").write_text("a list of them")
    (tmp_path / "c/checkpoints").mkdir(parents=True)
    (tmp_path / "c/checkpoints/7").write_text("")
    for name in ("a", "b", "c"):
        refusal = pytest.raises(
            ConfigError, match=r"^--workdir: .*checkpoints.* another --workdir$"
        )
        with refusal, run_directory.opened(str(tmp_path / name)):
            pass
    (tmp_path / "d/checkpoints/100").mkdir(parents=True)  # empty: nothing to lose
    (tmp_path / "d/checkpoints/latest.pt").write_text("has no step's name")
    with run_directory.opened(str(tmp_path / "d")):
        pass


def test_the_tokenizer_of_no_run_is_not_replaced(tmp_path):
    """Somebody keeps a downloaded one there."""
    (tmp_path / "tokenizer.safetensors").write_bytes(b"weights")
    refusal = pytest.raises(ConfigError, match=r"^--workdir: .*tokenizer\.safetensors is in a dir")
    with refusal, run_directory.opened(str(tmp_path)):
        pass
    with_checkpoint(tmp_path)
    with run_directory.opened(str(tmp_path)):
        pass


def test_an_evaluation_checks_only_what_it_writes(tmp_path):
    (tmp_path / "config.json").write_text("[")  # a run may be about to make it again
    run_directory.check_for_evaluation(str(tmp_path))
    (tmp_path / "evaluation.json").write_text('{"by": "another program"}')
    with pytest.raises(ConfigError, match=r"^--workdir: .*evaluation\.json was written by another"):
        run_directory.check_for_evaluation(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_whole_runs_files_are_left_as_they_are(tmp_path, caplog):
    with_checkpoint(tmp_path)
    summary = '{"steps": 10, "loss": NaN, "seconds": 3.0, "images_per_second": null}'
    (tmp_path / "summary.json").write_text(summary)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path.name for path in tmp_path.iterdir()}
    with caplog.at_level(logging.WARNING), run_directory.opened(str(tmp_path)):
        pass
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not caplog.records


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError), run_directory.opened(str(tmp_path / "run")):
        raise ConfigError("config.data.source: no images")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    ours = ("config.json.123.tmp", "metrics.jsonl.9.tmp", "reconstruction.png.77.tmp")
    others = ("notes.txt.123.tmp", "config.json.tmp", "evaluation.json.123.tmp", "config.json.bak")
    for name in (*ours, *others):
        (tmp_path / name).write_text("half")
    with run_directory.opened(str(tmp_path)):  # nothing says that this is a run's directory
        assert {path.name for path in tmp_path.iterdir()} >= {*ours, *others}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with run_directory.opened(str(tmp_path)):
        left = {path.name for path in tmp_path.iterdir()}
    assert not left & set(ours)
    assert left >= set(others)


@pytest.mark.parametrize("name", ["²", "007", "1" * 30, "٣"])
def test_a_folder_with_a_number_that_is_no_step_is_refused(tmp_path, name):
    (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match="is not a checkpoint of a run"),
        run_directory.opened(str(tmp_path)),
    ):
        pass
    assert not native.is_checkpoint(str(tmp_path))


def test_a_folder_in_a_pictures_place_is_refused_before_the_run(tmp_path):
    (tmp_path / "reconstruction.png").mkdir()
    run_directory.check_pictures(str(tmp_path), ["first_batch"])
    with pytest.raises(ConfigError, match=r"^--workdir: .*reconstruction\.png is a folder"):
        run_directory.check_pictures(str(tmp_path), ["first_batch", "reconstruction"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"run": {"command": "npm start"}, "precious": 1}'),
        ("summary.json", '{"seconds": 12, "experiment": "mine"}'),
        ("summary.json", '{"steps": 12, "reward": 3.5}'),
        ("evaluation.json", '{"steps": 12, "model": "mine"}'),
    ],
)
def test_one_key_in_common_makes_no_file_this_programs(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refusal = pytest.raises(ConfigError, match=rf"^--workdir: .*{name} was written by another prog")
    with refusal, run_directory.opened(str(tmp_path)):
        pass
    assert (tmp_path / name).read_text() == content
