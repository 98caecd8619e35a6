"""Trackers are given the same; their errors end no run; a W&B run is resumed by its id."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.training import metrics, writers
from tests.tasks import tiny

PICTURE = np.zeros((4, 6, 3), np.uint8)


class FakeRun:
    url, dir = "https://fake/run", "/fake"

    def __init__(self, **settings):
        self.settings, self.logged, self.exit_code = settings, [], None
        self.broken = False

    def define_metric(self, name, **settings):
        pass

    def log(self, values):
        if self.broken:
            raise RuntimeError("the server is\naway")
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch):
    """The runs that a fake `wandb` has opened."""
    opened = []

    def init(**settings):
        opened.append(FakeRun(**settings))
        return opened[-1]

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    fake.init, fake.Settings, fake.Image = init, dict, lambda picture: picture.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return opened


def write(workdir, project="p", error=None):
    log = metrics.MetricsLog(
        str(workdir), start_step=0, project=project, config={"model": {"width": 3}}
    )
    try:
        log.write(1, {"loss": 2.0})
        log.write(1, {"eval_loss": 3.0})
        log.write_picture(1, "seen", PICTURE)
        log.flush()
        if error:
            raise error
    finally:
        log.close()


def test_a_run_is_told_all_and_resumed(runs, tmp_path):
    workdir = tmp_path / "runs" / "a"
    write(workdir)
    write(workdir)
    first, second = runs
    assert first.logged == second.logged
    assert first.logged == [
        {"loss": 2.0, "step": 1},
        {"eval_loss": 3.0, "step": 1},
        {"seen": [(4, 6, 3)], "step": 1},
    ]
    assert first.settings["project"] == "p"
    assert first.settings["name"] == "runs/a"
    assert first.settings["config"] == {"model": {"width": 3}}
    assert first.settings["resume"] == "allow"
    assert first.settings["id"] == second.settings["id"] != ""
    assert first.exit_code == 0
    (workdir / "wandb_id.txt").write_text("no / id\n")
    write(workdir)
    assert runs[-1].settings["id"] not in (first.settings["id"], "no / id")


def test_without_a_project_there_is_no_run(runs, tmp_path):
    write(tmp_path, project="")
    assert not runs
    assert not (tmp_path / "wandb_id.txt").exists()


def test_a_run_that_an_error_ends_is_marked(runs, tmp_path):
    with pytest.raises(KeyError):
        write(tmp_path, error=KeyError("x"))
    assert runs[0].exit_code == 1


def test_a_trackers_errors_are_logged_once_and_end_no_run(runs, tmp_path, caplog, monkeypatch):
    log = metrics.MetricsLog(str(tmp_path), start_step=0, project="p", config={})
    log.write(1, {"loss": 2.0})
    runs[0].broken = True
    log.write(2, {"loss": 1.0})
    log.write(3, {"loss": 0.5})
    log.close()
    said = [line for line in caplog.messages if line.startswith("NO MORE OF THE RUN AT W&B")]
    assert len(said) == 1
    assert "the server is; metrics.jsonl goes on" in said[0]
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]

    def refuse(**settings):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    assert writers.open_wandb(str(tmp_path), project="p", config={}) is None
    assert "NO W&B RUN in project p: not logged in" in caplog.text
    assert "WANDB_MODE=offline" in caplog.text


def test_what_is_not_installed_is_said_before_anything_happens(tmp_path, monkeypatch):
    values = tiny.pretrain()
    values.run.wandb = "my project"
    config = jobs.parse_job(values.to_dict())
    find = importlib.util.find_spec
    monkeypatch.setattr(
        writers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    from beit_jax.tasks import pretrain

    with pytest.raises(ConfigError, match=r"^config\.run\.wandb: .*'beit-jax\[wandb\]'$"):
        pretrain.run(config, workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    values.run.wandb = "a/b"
    with pytest.raises(ConfigError, match=r"config\.run\.wandb: must be the name of a project"):
        jobs.parse_job(values.to_dict())


@pytest.mark.slow
def test_the_real_one_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path)
    write(tmp_path)
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    kept = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in kept] == [f"run-{name}.wandb"] * 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/seen*.png"))) == 2
