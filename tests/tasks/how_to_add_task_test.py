"""A job added from outside the package: a linear model that predicts the mean colour of images.

Everything up to `run` is what a new file in `beit_jax/tasks` would hold, and the `toy` fixture is
its row in the table. The test follows "How to add a task" in CONTRIBUTING.md.
"""

import dataclasses
import itertools
import json
import shutil
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import jobs
from beit_jax.config import ConfigError, OptimizerConfig, RunConfig
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.unused import Unused
from beit_jax.drawing import sheets
from beit_jax.tasks.run_job import run_job
from beit_jax.training import metrics
from beit_jax.training.batch_augment import image_weights
from beit_jax.training.job import Feed, Job, RunContext, picture_of
from beit_jax.training.state import Task

SIZE = 4  # pixels along a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColourConfig:
    """Everything a run of the toy job is made of."""

    UNUSED: ClassVar[dict[str, Unused]] = {
        "optimizer.layer_decay": Unused("the model has a single layer"),
    }

    task: str = "toy"
    run: RunConfig
    optimizer: OptimizerConfig
    held_out: int = 10
    evaluate_only: bool = False

    def __post_init__(self) -> None:
        check_warmup(self.optimizer, self.run)


def run(config: ColourConfig, *, workdir: str) -> dict:
    return run_job(config, build=build, workdir=workdir)


def build(config: ColourConfig, context: RunContext) -> Job:
    feed = colour_feed(config)
    sample = next(iter(feed.evaluation()))["image"]
    return Job(
        task=colour_task(),
        feed=feed,
        pictures={"colours": picture_of(lambda params: draw(params, sample))},
        evaluate_only=config.evaluate_only,
    )


def predict(params, images):
    """float32 `[b, SIZE * SIZE * 3]` → `[b, 3]`."""
    return images.reshape(len(images), -1) @ params["head"]["kernel"]


def colour_task() -> Task:
    def prepare(frozen, batch, key):
        return {"image": batch["image"] / 255.0, "weight": image_weights(batch)}

    def loss(params, batch, key, step):
        errors = jnp.square(predict(params, batch["image"]) - batch["image"].mean((1, 2))).sum(1)
        total = (errors * batch["weight"]).sum()
        return total, {"loss": total, "weight": batch["weight"].sum()}

    return Task(
        init=lambda key: {"head": {"kernel": 0.1 * jax.random.normal(key, (SIZE * SIZE * 3, 3))}},
        prepare=prepare,
        loss=loss,
        evaluate=lambda params, frozen, batch: loss(params, prepare({}, batch, None), None, 0)[1],
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={},
        flops_per_image=6.0 * SIZE * SIZE * 3 * 3,
    )


def colour_feed(config: ColourConfig) -> Feed:
    def images(seed, count):
        return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)

    def training(start_step):
        for step in itertools.count(start_step):
            yield {"image": images((1, step), config.run.batch_size)}

    def evaluation():
        size, padded = config.run.batch_size, -(-config.held_out // config.run.batch_size)
        for batch in range(padded):
            valid = np.arange(batch * size, (batch + 1) * size) < config.held_out
            yield {"image": images((2, batch), size), "valid": valid}

    return Feed(training=training, evaluation=evaluation, metrics=dict)


def draw(params, images):
    predicted = np.asarray(predict(params, jnp.asarray(images) / 255.0))[:, None, None]
    colours = sheets.to_uint8(np.broadcast_to(predicted, images.shape))
    return sheets.columns_sheet({"image": images, "mean colour": colours})


# ---------------------------------------------------------------------------- its row, and tests


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(jobs.JOBS, "toy", (ColourConfig, run))


def values(**changes):
    settings = {
        "task": "toy",
        "run": {"steps": 40, "batch_size": 8, "log_every": 1, "checkpoint_every": 15},
        "optimizer": {"learning_rate": 0.03, "warmup_steps": 2, "weight_decay": 0.0},
    }
    settings["run"] |= {"checkpoint_minutes": 0.0, "picture_every": 20, "eval_every": 20}
    return settings | changes


@pytest.mark.slow
def test_it_trains_resumes_draws_and_evaluates(toy, tmp_path, capsys):
    straight = jobs.run(values(), workdir=str(tmp_path / "straight"))
    lines = metrics.read(str(tmp_path / "straight/metrics.jsonl"))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == straight["steps"] == 40
    assert straight["loss"] < 0.5 * losses[0]
    assert json.loads((tmp_path / "straight/summary.json").read_text()) == straight
    assert [line["step"] for line in lines if "eval_loss" in line] == [20, 40]
    assert np.asarray(Image.open(tmp_path / "straight/colours.png")).std() > 10

    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    for step in ("30", "40"):
        shutil.rmtree(tmp_path / "killed/checkpoints" / step)
    again = jobs.run(values(), workdir=str(tmp_path / "killed"))
    assert again["loss"] == straight["loss"]

    capsys.readouterr()
    alone = jobs.run(values(evaluate_only=True), workdir=str(tmp_path / "straight"))
    assert alone == {"steps": 40, "loss": straight["loss"]}
    assert json.loads((tmp_path / "straight/evaluation.json").read_text()) == alone
    assert capsys.readouterr().out.startswith(f"loss {alone['loss']:.4g}  ")


def test_wrong_settings_are_named(toy, tmp_path):
    for change, message in (
        ({"evaluate_only": True}, r"config\.run\.init_from: nothing to evaluate"),
        ({"colours": 3}, r"config\.colours: unknown key"),
        ({"optimizer": values()["optimizer"] | {"warmup_steps": 50}}, r"warmup_steps: 50 is more"),
        (
            {"optimizer": values()["optimizer"] | {"layer_decay": 0.5}},
            r"config\.optimizer\.layer_decay: 0\.5 would have no effect: the model has a single",
        ),
        ({"run": values()["run"] | {"batch_size": 12}}, r"config\.run\.batch_size: 12 does not"),
    ):
        with pytest.raises(ConfigError, match=message):
            jobs.run(values(**change), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run/config.json").exists()
