"""Checkpoints are restored exactly, checked and never half-written; what a run starts from."""

import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import (
    ConfigError,
    OptimizerConfig,
    RunConfig,
    fixes,
    presence_setting,
    shape_setting,
    to_dict,
)
from beit_jax.tasks.tokenizer import tokenizer_task
from beit_jax.training import checkpoint, optim, sharding
from beit_jax.training.state import Task, init_state, state_shapes
from tests.tasks import tiny

RUN = RunConfig(steps=10, batch_size=8, checkpoint_every=2, keep_checkpoints=2)
CONFIG = {"model": {"width": 4}, "run": {"steps": 10}}


def tiny_task(width=4) -> Task:
    return Task(
        init=lambda key: {"lm_head": {"kernel": jax.random.normal(key, (8, width))}},
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )


@pytest.fixture
def made():
    task = tiny_task()
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    mesh = sharding.make_mesh(fsdp=1)
    shapes = state_shapes(task, optimizer, mesh)
    placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(lambda key: init_state(task, optimizer, key), out_shardings=placements)(
        jax.random.key(0)
    )
    return shapes, state


def at_step(state, step):
    return dataclasses.replace(
        state,
        step=jnp.full_like(state.step, step),
        params=jax.tree.map(lambda x: x + step, state.params),
    )


def write(workdir, state, steps, run=RUN):
    checkpoints = checkpoint.Checkpoints(str(workdir), run=run, config=CONFIG)
    checkpoints.write_config()
    for step in steps:
        checkpoints.save(at_step(state, step), step=step)
    checkpoints.close()


def test_restore_gives_back_every_bit_of_the_newest_and_keeps_the_last_few(tmp_path, made):
    shapes, state = made
    write(tmp_path, state, [2, 4, 6])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["4", "6"]
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    restored = checkpoints.restore(shapes)
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(at_step(state, 6)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert checkpoint.saved_config(str(tmp_path)) == CONFIG
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def damage(workdir: Path, step: int) -> None:
    """Cuts off the largest data file, as an interrupted copy would."""
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    data = [p for p in files if "/d/" in str(p)]
    for path in data or files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, made, caplog):
    shapes, state = made
    write(tmp_path, state, [2, 4])
    damage(tmp_path, 4)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    with caplog.at_level(logging.ERROR):
        restored = checkpoints.restore(shapes)
    assert int(restored.step) == 2
    assert "checkpoint 4" in caplog.text
    assert [p.name.split("-")[0] for p in (tmp_path / "unreadable_checkpoints").iterdir()] == ["4"]
    checkpoints.save(at_step(state, 4), step=4)  # the step can be saved again
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    assert int(checkpoints.restore(shapes).step) == 4
    checkpoints.close()


def exchange(workdir: Path, step: int, other: int) -> None:
    """Gives a checkpoint the state of another: whole files with other numbers."""
    shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    shutil.copytree(
        workdir / "checkpoints" / str(other) / "state",
        workdir / "checkpoints" / str(step) / "state",
    )


def test_numbers_that_were_not_saved_are_damage_too(tmp_path, made, caplog):
    """Every file is whole, and without digests the state would be restored without a word."""
    shapes, state = made
    write(tmp_path, state, [2, 4])
    exchange(tmp_path, 4, 2)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    with caplog.at_level(logging.ERROR):
        restored = checkpoints.restore(shapes)
    checkpoints.close()
    assert int(restored.step) == 2
    assert "do not hold the numbers that were saved" in caplog.text
    assert [p.name.split("-")[0] for p in (tmp_path / "unreadable_checkpoints").iterdir()] == ["4"]


def test_digests_that_were_written_must_be_there(tmp_path, made, caplog):
    shapes, state = made
    write(tmp_path, state, [2, 4])
    shutil.rmtree(tmp_path / "checkpoints/4/digests")
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    with caplog.at_level(logging.ERROR):
        assert int(checkpoints.restore(shapes).step) == 2
    checkpoints.close()
    assert "its folder digests is missing" in caplog.text


@pytest.fixture
def never_waits():
    """A pipe that is waited for ends the test instead of stopping it for ever."""

    def waited(number, frame):
        pytest.exit("a pipe was waited for", returncode=1)  # an exception may be caught on its way

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["digests/metadata", "config/metadata"])
def test_a_pipe_in_a_checkpoint_is_damage_and_is_not_waited_for(tmp_path, made, never_waits, name):
    shapes, state = made
    write(tmp_path, state, [2, 4])
    (tmp_path / "checkpoints/4" / name).unlink()
    os.mkfifo(tmp_path / "checkpoints/4" / name)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    assert int(checkpoints.restore(shapes).step) == 2
    checkpoints.close()


def test_a_pipe_that_orbax_would_wait_for_is_refused_by_name(tmp_path, made, never_waits):
    write(tmp_path, made[1], [2, 4])
    (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").unlink()
    os.mkfifo(tmp_path / "checkpoints/2/_CHECKPOINT_METADATA")
    with pytest.raises(ConfigError, match=r"^--workdir: .*/2/_CHECKPOINT_METADATA is no regular f"):
        checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)


def test_best_parameters_replace_those_of_the_same_step_and_of_later_ones(tmp_path, made):
    """What came after a checkpoint is done again; Orbax would keep the latest step's."""
    _, state = made
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    for step, value in ((4, 0.5), (4, 0.4), (3, 0.6), (5, 0.7)):
        checkpoints.save_best(state.params, step=step, note={"value": value})
        assert checkpoints.best() == {"value": value, "step": step}
    checkpoints.close()
    assert [p.name for p in (tmp_path / "best/checkpoints").iterdir()] == ["5"]


@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.parametrize("changed", ["", "config", "identity"])
def test_best_parameters_of_steps_not_done_with_these_settings_are_set_aside(
    tmp_path, made, caplog, start, changed
):
    _, state = made
    settings = {"run": RUN, "config": CONFIG, "identity": {"tokenizer.path": "a"}}
    checkpoints = checkpoint.Checkpoints(str(tmp_path), **settings)
    checkpoints.save_best(state.params, step=4, note={"value": 0.5})
    checkpoints.close()
    other = {"config": CONFIG | {"seed": 5}, "identity": {"tokenizer.path": "b"}}
    settings |= {name: value for name, value in other.items() if name == changed}
    checkpoints = checkpoint.Checkpoints(str(tmp_path), **settings)
    with caplog.at_level(logging.WARNING):
        checkpoints.check_best(start=start)
    is_other = changed and start < 4
    assert checkpoints.best() == (None if is_other else {"value": 0.5, "step": 4})
    checkpoints.close()
    aside = [path.name[:6] for path in (tmp_path / "best").glob("aside/*")]
    assert aside == (["best-4"] if is_other else [])
    assert ("which this run has not done" in caplog.text) == bool(is_other)


def test_a_renamed_checkpoint_is_none(tmp_path, made):
    """The newest for ever, it would hide what is saved after it."""
    shapes, state = made
    write(tmp_path, state, [2, 4])
    (tmp_path / "checkpoints/4").rename(tmp_path / "checkpoints/30")
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    assert int(checkpoints.restore(shapes).step) == 2
    checkpoints.close()
    (aside,) = (tmp_path / "unreadable_checkpoints").iterdir()
    assert aside.name.startswith("30-")


def test_checkpoints_on_another_disk_are_set_aside_there(tmp_path, made, monkeypatch):
    shapes, state = made
    write(tmp_path / "disk", state, [2, 4])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    damage(tmp_path / "disk", 4)
    rename = os.rename

    def of_one_disk(source, target, **options):
        if "unreadable_checkpoints" in str(target) and "/checkpoints/unread" not in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", of_one_disk)
    for _ in range(2):
        checkpoints = checkpoint.Checkpoints(str(tmp_path / "run"), run=RUN, config=CONFIG)
        assert int(checkpoints.restore(shapes).step) == 2
        checkpoints.close()
    (aside,) = (tmp_path / "disk/checkpoints/unreadable_checkpoints").iterdir()
    assert aside.name.startswith("4-")


def test_damaged_best_parameters_are_set_aside_and_found_again(tmp_path, made, caplog):
    """By the run that continues; within a run, they are what it has just written."""
    shapes, state = made

    def opened(run=RUN):
        return checkpoint.Checkpoints(str(tmp_path), run=run, config=CONFIG)

    checkpoints = opened()
    checkpoints.save_best(state.params, step=4, note={"value": 0.5})
    assert checkpoints.best() == {"value": 0.5, "step": 4}
    checkpoints.close()
    checkpoints = opened()
    assert checkpoints.best() == {"value": 0.5, "step": 4}
    checkpoints.close()

    other = jax.tree.map(lambda x: x + 1, state.params)
    checkpoint.native.write_params(str(tmp_path / "other"), other, config={})
    shutil.rmtree(tmp_path / "best/checkpoints/4/state")
    shutil.copytree(tmp_path / "other/state", tmp_path / "best/checkpoints/4/state")
    checkpoints = opened(dataclasses.replace(RUN, on_corrupt_checkpoint="fail"))
    with pytest.raises(ConfigError, match=r"^the best parameters: .*best/checkpoints/4 is damaged"):
        checkpoints.best()
    checkpoints.close()
    with pytest.raises(
        ConfigError, match=r"init_from: .*/4 is damaged: params/lm_head/kernel does"
    ):
        checkpoint.restore_params(str(tmp_path / "best"), shapes=shapes.params)
    checkpoints = opened()
    with caplog.at_level(logging.ERROR):
        assert checkpoints.best() is None
    assert "moved to" in caplog.text
    checkpoints.save_best(state.params, step=6, note={"value": 0.4})
    assert checkpoints.best() == {"value": 0.4, "step": 6}
    checkpoints.close()
    (aside,) = (tmp_path / "unreadable_checkpoints").iterdir()
    assert aside.name.startswith("best-4-")


def test_damage_ends_the_run_where_the_config_says_so(tmp_path, made):
    shapes, state = made
    write(tmp_path, state, [2, 4])
    damage(tmp_path, 4)
    strict = dataclasses.replace(RUN, on_corrupt_checkpoint="fail")
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=strict, config=CONFIG)
    with pytest.raises(ValueError, match=r"(?i)out_of_range|error|corrupt"):
        checkpoints.restore(shapes)
    checkpoints.close()
    damage(tmp_path, 2)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore(shapes)
    checkpoints.close()


def test_another_number_of_devices_restores_every_bit(tmp_path):
    """FSDP over 8 devices → 1, 2, 4 (some with data parallelism) and back to 8, saved each time."""
    task = tiny_task(width=16)
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))

    def shapes_on(devices, fsdp):
        mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
        return state_shapes(task, optimizer, mesh)

    shapes = shapes_on(8, 8)
    placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(lambda key: init_state(task, optimizer, key), out_shardings=placements)(
        jax.random.key(0)
    )
    thirds = jax.tree.map(
        lambda x: x + 1 / 3 if jnp.issubdtype(x.dtype, jnp.floating) else x, state.opt_state
    )
    state = dataclasses.replace(state, opt_state=jax.device_put(thirds, placements.opt_state))
    expected = sharding.to_host(state)
    assert np.asarray(expected.opt_state[0].mu["lm_head"]["kernel"]).any()
    write(tmp_path, state, [0])
    for step, (devices, fsdp) in enumerate([(1, 1), (2, 2), (4, 2), (8, 1), (8, 8)], start=1):
        shapes = shapes_on(devices, fsdp)
        checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
        restored = checkpoints.restore(shapes)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
            assert leaf.sharding == wanted.sharding
        kernel = restored.params["lm_head"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (8, 16 // fsdp)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        checkpoints.save(restored, step=step)
        checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = shape_setting(4)
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    vocabulary: int = shape_setting(16)
    channels: int = shape_setting(8)


@dataclasses.dataclass(frozen=True)
class Job:
    """A config as jobs have them, as far as checkpoints look at it."""

    model: Model = Model()
    tokenizer: Tokenizer = dataclasses.field(default=Tokenizer(), metadata=fixes("vocabulary"))
    average: float | None = presence_setting(None)
    steps: int = 10


def started_as(workdir, state, config):
    """A run's directory with one checkpoint."""
    checkpoints = checkpoint.Checkpoints(str(workdir), run=RUN, config=config)
    checkpoints.write_config()
    checkpoints.save(at_step(state, 2), step=2)
    checkpoints.close()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Job(model=Model(width=6), steps=20), r"config\.model\.width: was 4, now 6: differs from"),
        (Job(tokenizer=Tokenizer(vocabulary=32)), r"config\.tokenizer\.vocabulary: was 16, now 32"),
        (Job(average=0.99), r"config\.average: was None, now 0\.99"),
    ],
)
def test_a_setting_that_fixes_what_is_trained_is_refused(tmp_path, made, now, message):
    _, state = made
    started_as(tmp_path, state, Job())
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=now)
    with pytest.raises(ConfigError, match=rf"^{message}.*choose another --workdir$"):
        checkpoints.write_config()
    checkpoints.close()


def test_other_settings_may_change_and_are_logged(tmp_path, made, caplog):
    """A frozen part's width, a rate, and an average that was there before."""
    _, state = made
    started_as(tmp_path, state, Job(average=0.99))
    now = Job(model=Model(rate=0.2), tokenizer=Tokenizer(channels=4), average=0.999)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=now)
    with caplog.at_level(logging.INFO):
        checkpoints.write_config()
    checkpoints.close()
    changed = [text.split("config.")[1] for text in caplog.messages if "changed since" in text]
    assert changed == [
        "average: was 0.99, now 0.999",
        "model.rate: was 0.1, now 0.2",
        "tokenizer.channels: was 8, now 4",
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(now)


def test_settings_newer_than_the_run_are_at_their_defaults(tmp_path, made, caplog):
    _, state = made
    started_as(tmp_path, state, Job())
    old = to_dict(Job())
    del old["average"], old["model"]["rate"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=Job())
    with caplog.at_level(logging.INFO):
        checkpoints.write_config()
    checkpoints.close()
    assert "changed since" not in caplog.text


@pytest.mark.slow
def test_another_width_of_a_trained_tokenizer_is_one_clear_line(tmp_path):
    """It used to pass and to end in a traceback."""
    first = jobs.parse_job(tiny.tokenizer().to_dict())
    task = tokenizer_task(first)
    optimizer = optim.adamw(first.optimizer)
    state = jax.jit(functools.partial(init_state, task, optimizer))(jax.random.key(0))
    started_as(tmp_path, state, first)
    wider = dataclasses.replace(first, tokenizer=dataclasses.replace(first.tokenizer, width=12))
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=wider)
    with pytest.raises(ConfigError, match=r"^config\.tokenizer\.width: was 8, now 12: differs"):
        checkpoints.write_config()
    checkpoints.close()


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    run = dataclasses.replace(RUN, checkpoint_every=5, checkpoint_minutes=10.0)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=run, config=CONFIG)
    assert [step for step in range(1, 12) if checkpoints.due(step)] == [5, 10]
    now = checkpoint.time.monotonic()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now + 601)
    assert checkpoints.due(3)
    checkpoints.close()


def test_a_warm_start_from_damage_names_another_checkpoint(tmp_path, made):
    """It is not taken without a word: whose weights a run starts from is for a person to say."""
    shapes, state = made
    write(tmp_path, state, [2, 4])
    exchange(tmp_path, 4, 2)
    with pytest.raises(
        ConfigError, match=r"^config\.run\.init_from: .*checkpoints/4 is damaged"
    ) as e:
        checkpoint.restore_params(str(tmp_path), shapes=shapes.params)
    assert str(e.value).endswith(f"choose another: {tmp_path}/checkpoints/2")
    for part in ("config", "state/_METADATA", "digests"):
        for file in [p for p in (tmp_path / "checkpoints/2").rglob("*") if part in str(p)]:
            if file.is_file() and file.name != "commit_success.txt":
                file.write_bytes(file.read_bytes()[:-3])
        read = checkpoint.saved_config if part == "config" else checkpoint.saved_params_shapes
        with pytest.raises(ConfigError, match=r"^checkpoint: .*checkpoints/2") as e:
            read(str(tmp_path / "checkpoints/2"))
        assert "\n" not in str(e.value)


def test_warm_start_takes_parameters_and_reports_what_does_not_fit(tmp_path, made):
    shapes, state = made
    write(tmp_path, state, [2, 4])
    restored = checkpoint.restore_params(str(tmp_path), shapes=shapes.params)
    np.testing.assert_array_equal(
        restored["lm_head"]["kernel"], state.params["lm_head"]["kernel"] + 4
    )
    older = checkpoint.restore_params(str(tmp_path / "checkpoints/2"), shapes=shapes.params)
    np.testing.assert_array_equal(older["lm_head"]["kernel"], state.params["lm_head"]["kernel"] + 2)

    wrong = state_shapes(
        tiny_task(width=6),
        optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0)),
        sharding.make_mesh(fsdp=1),
    )
    with pytest.raises(ConfigError, match=r"lm_head.* 4 .*needed 6"):
        checkpoint.restore_params(str(tmp_path), shapes=wrong.params)
    with pytest.raises(ConfigError, match=r"config\.run\.init_from: no checkpoint in .*nowhere"):
        checkpoint.restore_params(str(tmp_path / "nowhere"), shapes=shapes.params)


def test_a_save_that_failed_in_the_background_is_said_at_the_next_check(tmp_path, made):
    _, state = made
    checkpoints = checkpoint.Checkpoints(str(tmp_path), run=RUN, config=CONFIG)
    checkpoints.check()

    def full(step):
        raise OSError(28, "No space left on device")

    checkpoints._manager._finalize_checkpoint = full
    checkpoints.save(at_step(state, 2), step=2)
    deadline, said = time.monotonic() + 60, ""
    while not said and time.monotonic() < deadline:
        try:
            checkpoints.check()  # as often as a run logs
        except OSError as error:
            said = str(error)
        time.sleep(0.05)
    assert "No space left" in said
