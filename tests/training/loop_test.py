"""The train loop with a task small enough to see through: linear regression."""

import dataclasses
import json
import logging
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError, OptimizerConfig, RunConfig
from beit_jax.training import checkpoint, loop, metrics
from beit_jax.training.state import Task

WIDTH = 4
RUN = RunConfig(
    steps=20, batch_size=8, log_every=1, checkpoint_every=5, checkpoint_minutes=0.0, eval_every=10
)
OPTIMIZER = OptimizerConfig(learning_rate=0.3, warmup_steps=3, weight_decay=0.0, max_bad_steps=3)
SPEEDS = ("seconds_left", "data_wait_share", "mfu")  # and all in images per second
TRUTH = np.arange(1, WIDTH + 1, dtype=np.float32)


def regression() -> Task:
    def loss(params, batch, key, step):
        noise = 0.01 * jax.random.normal(key, batch["x"].shape)  # randomness follows the step
        predicted = (batch["x"] + noise) @ params["head"]["kernel"][:, 0]
        total = (jnp.square(predicted - batch["y"]) * batch["valid"]).sum()
        return total, {"loss": total, "weight": batch["valid"].sum()}

    def evaluate(params, frozen, batch):
        total = jnp.square(batch["x"] @ params["head"]["kernel"][:, 0] - batch["y"])
        valid = batch["valid"].astype(jnp.float32)
        return {"loss": (total * valid).sum(), "weight": valid.sum()}

    return Task(
        init=lambda key: {"head": {"kernel": jax.random.normal(key, (WIDTH, 1))}},
        prepare=lambda frozen, batch, key: batch | {"valid": jnp.ones(batch["x"].shape[0])},
        loss=loss,
        evaluate=evaluate,
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={},
        flops_per_image=1.0,
    )


class Crash(RuntimeError):
    pass


def feed(*, crash_at=None, poison=(), batch_size=8, held_out=21) -> loop.Feed:
    """Batches are a function of the step; `poison`ed steps hold a NaN."""

    def training(start):
        step = start
        while True:
            if step == crash_at:
                raise Crash
            rng = np.random.default_rng(step)
            x = rng.normal(size=(batch_size, WIDTH)).astype(np.float32)
            if step in poison:
                x[0, 0] = np.nan
            yield {"x": x, "y": x @ TRUTH}
            step += 1

    def evaluation():
        x = np.random.default_rng(99).normal(size=(held_out, WIDTH)).astype(np.float32)
        for start in range(0, held_out, batch_size):
            part = x[start : start + batch_size]
            padded = np.zeros((batch_size, WIDTH), np.float32)
            padded[: len(part)] = part
            valid = np.arange(batch_size) < len(part)
            yield {"x": padded, "y": padded @ TRUTH, "valid": valid}

    return loop.Feed(training=training, evaluation=evaluation, metrics=lambda: {"replaced": 0.0})


def train(workdir, *, run=RUN, **settings):
    return loop.train(
        loop.Job(task=regression(), feed=feed(**settings)),
        run=run,
        optimizer_config=OPTIMIZER,
        config={"model": {}},
        workdir=str(workdir),
    )


def losses(workdir):
    lines = metrics.read(str(workdir / "metrics.jsonl"))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(workdir)


def test_it_learns_logs_evaluates_and_saves(straight):
    workdir, trained = straight
    lines = metrics.read(str(workdir / "metrics.jsonl"))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[0]["learning_rate"] == 0.0
    expected = {"grad_norm", "images_per_second", "data_wait_share", "seconds_left", "skipped"}
    assert expected <= steps[0].keys()
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert lines[-1]["eval_loss"] == trained.evaluation["loss"]
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [10, 15, 20]
    assert any(p.name.startswith("events.out.tfevents") for p in workdir.iterdir())


@pytest.mark.parametrize("crash_at", [7, 12])
def test_resume_is_bit_exact(straight, tmp_path, crash_at):
    """Parameters, optimizer and every logged loss, though steps after the checkpoint ran twice."""
    workdir, trained = straight
    with pytest.raises(Crash):
        train(tmp_path, crash_at=crash_at)
    assert max(losses(tmp_path)) >= crash_at - 2
    again = train(tmp_path)
    same(again.state, trained.state)
    assert losses(tmp_path) == losses(workdir)
    assert again.evaluation == trained.evaluation


def test_a_finished_run_is_not_run_again(straight, tmp_path):
    workdir, trained = straight
    before = (workdir / "metrics.jsonl").read_text()
    again = train(workdir)
    same(again.state, trained.state)
    assert again.images_per_second is None
    assert again.evaluation == trained.evaluation
    assert (workdir / "metrics.jsonl").read_text() == before


def lines_without_speeds(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in SPEEDS and not k.startswith("image")}
        for line in lines
    ]


@pytest.mark.parametrize("kind", ["exception", "SIGTERM"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_ends_in_an_evaluation_makes_up_for_it(
    straight, tmp_path, monkeypatch, kind, number
):
    """In the one at step 10, whose checkpoint SIGTERM writes first, or in the last, at step 20."""
    whole, begun = feed(), 0

    def evaluation():
        nonlocal begun
        begun += 1
        for batch in whole.evaluation():
            if begun == number and kind == "exception":
                raise Crash
            if begun == number:
                monkeypatch.setattr(loop.cluster, "preemption_point", lambda: True)
            yield batch

    interrupted = dataclasses.replace(whole, evaluation=evaluation)
    with pytest.raises(Crash if kind == "exception" else loop.cluster.Preempted):
        loop.train(
            loop.Job(task=regression(), feed=interrupted),
            run=RUN,
            optimizer_config=OPTIMIZER,
            config={"model": {}},
            workdir=str(tmp_path),
        )
    monkeypatch.undo()
    train(tmp_path)
    assert lines_without_speeds(tmp_path) == lines_without_speeds(straight[0])


def test_best_parameters_that_an_old_run_did_not_save_are_saved(tmp_path):
    """Earlier versions logged the result before they saved; a kill between left it at that."""
    job = loop.Job(task=dataclasses.replace(regression(), best="loss"), feed=feed())
    settings = {"optimizer_config": OPTIMIZER, "config": {}, "workdir": str(tmp_path)}
    loop.train(job, run=dataclasses.replace(RUN, steps=10), **settings)
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "best")
    trained = loop.train(job, run=dataclasses.replace(RUN, steps=11), **settings)
    assert trained.best["step"] == 10  # the loss was larger, which is better here
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def with_best(workdir, *, rate=0.3, held_out=21, run=RUN):
    """The best of a run whose metric is its loss: the larger the better."""
    return loop.train(
        loop.Job(task=dataclasses.replace(regression(), best="loss"), feed=feed(held_out=held_out)),
        run=run,
        optimizer_config=dataclasses.replace(OPTIMIZER, learning_rate=rate),
        config={"optimizer": {"learning_rate": rate}},
        workdir=str(workdir),
    ).best


@pytest.mark.slow
def test_the_best_parameters_of_another_run_are_not_this_runs(tmp_path):
    """It was ended before its first checkpoint, and nothing that came after it was as good."""
    good = with_best(tmp_path, rate=0.001)
    shutil.rmtree(tmp_path / "checkpoints")
    assert with_best(tmp_path, rate=0.001) == good
    assert not (tmp_path / "best/aside").exists()
    shutil.rmtree(tmp_path / "checkpoints")
    best = with_best(tmp_path)
    assert best["value"] < good["value"]
    (step,) = (tmp_path / "best/checkpoints").iterdir()
    assert int(step.name) == best["step"]
    assert len(list((tmp_path / "best/aside").iterdir())) == 1


def test_a_step_that_is_evaluated_again_has_its_last_result(tmp_path):
    run = dataclasses.replace(RUN, steps=5, eval_every=0)
    lines = [with_best(tmp_path, run=run, held_out=count) for count in (21, 8, 21)]
    assert [line["step"] for line in lines] == [5, 5, 5]
    assert lines[0] == lines[2] != lines[1]


def test_what_other_settings_left_in_the_log_is_there_once(straight, tmp_path):
    """Fewer steps, another interval, more steps again: each logged step once, in order."""
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    for changes in ({"steps": 10}, {"steps": 23, "log_every": 5}, {"eval_every": 5, "steps": 25}):
        train(tmp_path, run=dataclasses.replace(RUN, **changes))
    lines = metrics.read(str(tmp_path / "metrics.jsonl"))
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert raw == lines
    assert [line["step"] for line in raw if "loss" in line] == [*range(1, 21), 23, 24, 25]
    assert [line["step"] for line in raw if "eval_loss" in line] == [10, 20, 23, 25]


def test_evaluation_does_not_depend_on_the_batch(straight, tmp_path):
    """21 held-out rows in batches of 8, 16 and 24: the padding counts for nothing."""
    _, trained = straight
    for size in (16, 24):
        run = dataclasses.replace(RUN, batch_size=size, init_from=str(straight[0]), steps=1)
        other = train(tmp_path / str(size), run=run, batch_size=size)
        # Step 0 has learning rate 0: the parameters are still those of `straight`.
        np.testing.assert_allclose(other.evaluation["loss"], trained.evaluation["loss"], rtol=1e-5)


@pytest.mark.slow
def test_bad_steps_are_skipped_and_too_many_end_the_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trained = train(tmp_path / "few", poison={3, 4, 9})
    assert int(trained.state.skipped) == 3
    assert "the update is skipped (2 in a row)" in caplog.text
    assert np.isfinite(trained.evaluation["loss"])

    with pytest.raises(loop.NonFiniteError, match="step 11: 3 updates in a row were not finite"):
        train(tmp_path / "many", poison={8, 9, 10, 11, 12, 13})
    steps = [int(p.name) for p in (tmp_path / "many/checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) <= 10
    saved = checkpoint.restore_params(
        str(tmp_path / "many"),
        shapes={
            "head": {
                "kernel": jax.ShapeDtypeStruct(
                    (WIDTH, 1),
                    jnp.float32,
                    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
                )
            }
        },
    )
    assert np.isfinite(saved["head"]["kernel"]).all()
    assert "null" in (tmp_path / "many/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "settings",
    [{"beta1": 1.0}, {"beta2": 1.0}, {"weight_decay": 1e38, "learning_rate": 30.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_finite_is_not_saved(tmp_path, settings):
    """Loss and gradients are finite to the last; the parameters that come of them are not."""
    wild = dataclasses.replace(OPTIMIZER, max_bad_steps=1000)
    for name, value in settings.items():  # past the checks: settings do not lead here any more
        object.__setattr__(wild, name, value)
    run = dataclasses.replace(RUN, steps=7, checkpoint_every=1, log_every=7)
    with pytest.raises(loop.NonFiniteError, match=r"head/kernel.* hold NaN or infinities") as error:
        loop.train(
            loop.Job(task=regression(), feed=feed()),
            run=run,
            optimizer_config=wild,
            config={},
            workdir=str(tmp_path),
        )
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    if steps:
        assert f"the checkpoint of step {max(steps)} is sound" in str(error.value)
        kernel = checkpoint.native.read_params(str(tmp_path))["head"]["kernel"]
        assert np.isfinite(kernel).all()
    else:
        assert "there is no checkpoint" in str(error.value)


def test_a_short_run_without_a_good_update_has_not_ended_well(tmp_path):
    """Shorter than `max_bad_steps`, which would have ended it."""
    run = dataclasses.replace(RUN, steps=2)
    with pytest.raises(loop.NonFiniteError, match="none of the last 2 updates was finite"):
        train(tmp_path, run=run, poison={0, 1, 2})


def test_a_held_out_result_that_is_not_a_number_is_no_success(tmp_path):
    infinite = lambda params, frozen, batch: {"loss": jnp.float32(jnp.inf), "weight": 1.0}  # noqa: E731
    task = dataclasses.replace(regression(), evaluate=infinite)
    job = loop.Job(task=dataclasses.replace(task, best="loss"), feed=feed())
    arguments = {
        "run": dataclasses.replace(RUN, steps=2),
        "optimizer_config": OPTIMIZER,
        "config": {},
        "workdir": str(tmp_path),
    }
    with pytest.raises(loop.NonFiniteError, match="step 2: held-out loss is inf"):
        loop.train(job, **arguments)
    assert not list((tmp_path / "best").glob("checkpoints/[0-9]*"))
    mesh = loop.open_mesh(run=arguments["run"], accumulate=1)
    with pytest.raises(loop.NonFiniteError, match="held-out loss is inf"):
        loop.evaluate_only(job, mesh=mesh, **arguments)
    assert not (tmp_path / "evaluation.json").exists()


def test_own_checkpoint_comes_before_init_from(straight, tmp_path):
    first = train(tmp_path, run=dataclasses.replace(RUN, steps=2))
    run = dataclasses.replace(RUN, steps=2, init_from=str(straight[0]))
    same(train(tmp_path, run=run).state.params, first.state.params)


@pytest.mark.slow
def test_a_jobs_own_evaluation_is_logged_and_made_up_for(tmp_path):
    """At its period and at the end; SIGTERM in the middle leaves a checkpoint and no line."""
    measured, stop = [], {6}

    def measure(state):
        measured.append(int(state.step))
        if measured[-1] in stop:
            stop.clear()
            return None
        return {"online_value": float(state.step), "online_nothing": float("nan")}

    def train():
        loop.train(
            loop.Job(task=regression(), feed=feed(), online=loop.Online(every=3, measure=measure)),
            run=dataclasses.replace(RUN, steps=10, eval_every=0),
            optimizer_config=OPTIMIZER,
            config={},
            workdir=str(tmp_path),
        )

    with pytest.raises(loop.cluster.Preempted):
        train()
    train()
    assert measured == [3, 6, 6, 9, 10]
    train()
    assert measured == [3, 6, 6, 9, 10]
    lines = metrics.read(str(tmp_path / "metrics.jsonl"))
    found = [line for line in lines if "online_value" in line]
    assert [line["step"] for line in found] == [3, 6, 9, 10]
    assert found[-1] == {"step": 10, "online_value": 10.0, "online_nothing": None}
    assert [len(line) for line in lines if line["step"] == 10 and "online_value" not in line]


def test_pictures_are_drawn_when_asked(tmp_path):
    drawn = []

    def picture(state):
        drawn.append(int(state.step))
        return np.zeros((4, 4, 3), np.uint8)

    loop.train(
        loop.Job(task=regression(), feed=feed(), pictures={"line": picture}),
        run=dataclasses.replace(RUN, picture_every=8),
        optimizer_config=OPTIMIZER,
        config={},
        workdir=str(tmp_path),
    )
    assert drawn == [8, 16]


def test_a_batch_that_does_not_divide_stops_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.run\.batch_size: 12 does not divide"):
        train(tmp_path / "run", run=dataclasses.replace(RUN, batch_size=12))
    assert not (tmp_path / "run").exists()


def test_console_line_reads_well(monkeypatch):
    line = metrics.console_line(
        50,
        steps=1000,
        metrics={"loss": 6.93147, "mlm_acc": 0.0123, "learning_rate": 1.5e-4, "skipped": 0.0},
        speed={
            "images_per_second": 812.34,
            "images_per_second_per_chip": 101.5,
            "mfu": 0.3141,
            "data_wait_share": 0.02,
            "seconds_left": 3725.0,
        },
    )
    assert line == (
        "step   50/1000  loss 6.931  mlm_acc 0.0123  lr 1.50e-04  |  812.3 img/s  101.5 img/s/chip"
        "  mfu 31.4%  data wait 2%  eta 1:02:05"
    )


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert metrics.read(str(path)) == [{"step": 1, "loss": 2.0}]


def test_a_run_that_cannot_start_waits_for_its_first_batch(tmp_path):
    """TensorFlow aborts a process that ends while a thread reads."""
    read = []

    def training(start):
        time.sleep(0.5)
        read.append(start)
        yield {}

    with pytest.raises(ConfigError, match="nothing_there"):
        loop.train(
            loop.Job(task=regression(), feed=dataclasses.replace(feed(), training=training)),
            run=dataclasses.replace(RUN, init_from=str(tmp_path / "nothing_there")),
            optimizer_config=OPTIMIZER,
            config={},
            workdir=str(tmp_path / "run"),
        )
    assert read == [0]
