"""Room for checkpoints is known before a run; a disk's error in it names what is whole."""

import errno
import logging

import jax
import jax.numpy as jnp
import pytest

from beit_jax import storage
from beit_jax.config import RunError, parse
from beit_jax.config.run import RunConfig
from beit_jax.distributed.cluster import Preempted
from beit_jax.training import room
from beit_jax.training.state import TrainState
from tests.tasks import tiny


def run_config(**changes) -> RunConfig:
    settings = tiny.pretrain().run.to_dict()
    return parse(RunConfig, settings | {"steps": 100, "keep_checkpoints": 3} | changes)


def needed(*, kept=0, best_kept=0, best=0, step=0, **changes):
    return room.needed_bytes(
        state=10, best=best, kept=kept, best_kept=best_kept, run=run_config(**changes), step=step
    )


def test_one_more_than_is_kept_is_there_at_times():
    assert needed(checkpoint_every=10) == 40
    assert needed(checkpoint_minutes=5.0) == 40
    assert needed(checkpoint_every=10, kept=1) == 30
    assert needed(checkpoint_every=10, kept=3) == 10
    assert needed(checkpoint_every=10, kept=7) == 10  # fewer are kept than before


def test_a_run_takes_no_more_than_it_saves():
    assert needed() == 10  # at its end
    assert needed(checkpoint_every=40) == 30  # 40, 80, 100
    assert needed(checkpoint_every=40, step=80, kept=2) == 10
    assert needed(step=100, checkpoint_every=10) == 0


def test_the_best_parameters_count():
    assert needed(checkpoint_every=10, best=4) == 48
    assert needed(checkpoint_every=10, best=4, best_kept=1) == 44


@pytest.fixture
def shapes():
    params = {"w": jax.ShapeDtypeStruct((25, 10), jnp.float32)}
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        variables={},
        ema={},
        opt_state=(params, params),
        skipped=jax.ShapeDtypeStruct((), jnp.int32),
        skipped_in_row=jax.ShapeDtypeStruct((), jnp.int32),
    )


def check(shapes, workdir, **changes):
    run = run_config(checkpoint_every=10, **changes)
    room.check(shapes, run=run, workdir=str(workdir), step=0, keeps_best=False)


def test_no_room_for_one_checkpoint_is_refused(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda path: 3011)
    with pytest.raises(storage.StorageError) as error:
        check(shapes, tmp_path / "run")
    text = f"{tmp_path}/run: no room for a checkpoint (3.01 kB needed, 3.01 kB free)"
    assert str(error.value) == text
    assert error.value.of_room


def test_no_room_for_all_is_a_warning_with_both_numbers(shapes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(room, "free_bytes", lambda path: 3012)
    with caplog.at_level(logging.WARNING):
        check(shapes, tmp_path)
    assert "12 kB more (3.01 kB each, config.run.keep_checkpoints=3" in caplog.text
    caplog.clear()
    monkeypatch.setattr(room, "free_bytes", lambda path: 4 * 3012)
    check(shapes, tmp_path)
    assert caplog.text == ""


def test_what_is_there_is_paid_already(shapes, tmp_path, monkeypatch, caplog):
    for step in ("10", "20", "30.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    monkeypatch.setattr(room, "free_bytes", lambda path: 2 * 3012)
    check(shapes, tmp_path)
    assert caplog.text == ""


def test_a_token_cache_that_will_grow_counts(shapes, tmp_path, monkeypatch, caplog):
    assert room._holes(__file__) == 0  # a file of that name
    (tmp_path / "token_cache").mkdir()
    with open(tmp_path / "token_cache/a.tokens", "wb") as file:
        file.truncate(1 << 20)
    monkeypatch.setattr(room, "free_bytes", lambda path: 1 << 20)
    check(shapes, tmp_path)
    assert "and its token cache 1.05 MB, and 1.05 MB are free" in caplog.text


def test_a_bucket_is_not_asked(shapes):
    check(shapes, "gs://bucket/run")


def test_a_failed_save_says_what_it_needs_and_leaves_nothing_behind(tmp_path):
    unfinished = tmp_path / "checkpoints/8.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    for part in ("state", "config"):
        (tmp_path / "checkpoints/4" / part).mkdir(parents=True)
    path = str(unfinished / "state/d/ab")
    with (
        pytest.raises(storage.StorageError) as error,
        room.reported(str(tmp_path), state={"w": jnp.zeros(1000)}),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", path)
    assert not unfinished.exists()
    line = room.line(error.value, workdir=str(tmp_path))
    assert line.startswith(f"{tmp_path}/checkpoints/8: the disk is full (4 kB needed, ")
    assert line.endswith(
        "; the checkpoint at step 4 is whole, and the same command continues once there is room"
    )


def ended(error, *, workdir):
    """Closes a run that ends with `error`, on a full disk."""
    with room.reported(str(workdir), state={}):
        try:
            raise error
        finally:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_was_leaving_has_not_saved(tmp_path):
    with pytest.raises(storage.StorageError):
        ended(Preempted(8), workdir=tmp_path)


def test_the_runs_own_error_is_not_hidden_by_one_of_its_end(tmp_path, caplog):
    with pytest.raises(RunError, match="not finite"):
        ended(RunError("step 3: not finite"), workdir=tmp_path)
    assert "the disk is full" in caplog.text


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError), room.reported(str(tmp_path), state={}):
        raise KeyError("a")


def test_a_run_within_a_run_is_found(tmp_path):
    for part in ("state", "config"):
        (tmp_path / "pretrain/checkpoints/6" / part).mkdir(parents=True)
    fault = storage.StorageError(errno.EROFS, path=str(tmp_path / "pretrain/metrics.jsonl"))
    line = room.line(fault, workdir=str(tmp_path))
    assert "the file system is read-only; the checkpoint at step 6 is whole" in line
    assert line.endswith("once this is put right")
    elsewhere = storage.StorageError(errno.EROFS, path="/elsewhere/a")
    assert "there is no checkpoint yet" in room.line(elsewhere, workdir=str(tmp_path))
