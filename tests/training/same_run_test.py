"""What may not change in a run is refused in one line by the setting, and leaves all as it was."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError, OptimizerConfig, RunConfig, may_change, to_dict
from beit_jax.config.differences import ABSENT
from beit_jax.tokenizers.loading import open_tokenizer, save_params
from beit_jax.training import checkpoint, optim, same_run, sharding
from beit_jax.training.state import Task, init_state, state_shapes
from beit_jax.weights import native
from tests.tasks import tiny

RUN = RunConfig(steps=10, batch_size=8, keep_checkpoints=2)
CONFIG = {"task": "pretrain", "run": {"steps": 10}, "model": {"width": 4}}
IDENTITY = {"tokenizer": "1234"}


def states(*, width=4, average=False, **optimizer):
    """Shapes of a small train state, and one at step 0."""
    task = Task(
        init=lambda key: {"lm_head": {"kernel": jax.random.normal(key, (8, width))}},
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )
    made = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, **optimizer))
    shapes = state_shapes(task, made, sharding.make_mesh(fsdp=1), average=average)
    placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(
        lambda key: init_state(task, made, key, average=average), out_shardings=placements
    )(jax.random.key(0))
    return shapes, state


def write(workdir, *, steps=(2,), config=CONFIG, identity=IDENTITY, **made):
    _, state = states(**made)
    checkpoints = checkpoint.Checkpoints(str(workdir), run=RUN, config=config, identity=identity)
    checkpoints.write_config()
    for step in steps:
        checkpoints.save(
            dataclasses.replace(state, step=jnp.full_like(state.step, step)), step=step
        )
    checkpoints.close()


def everything(workdir):
    """Every file and its content."""
    return {path: path.read_bytes() for path in Path(workdir).rglob("*") if path.is_file()}


def restored(workdir, *, config=CONFIG, identity=IDENTITY, read_only=False, run=RUN, **made):
    checkpoints = checkpoint.Checkpoints(
        str(workdir), run=run, config=config, identity=identity, read_only=read_only
    )
    try:
        checkpoints.check_config()
        return checkpoints.restore(states(**made)[0])
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (
            {"width": 6},
            {**CONFIG, "model": {"width": 6}},
            r"config\.model\.width: was 4, now 6: .*lm_head/kernel is float32\[8, 4\] in the"
            r" checkpoint, float32\[8, 6\] in this run",
        ),
        ({"width": 6}, CONFIG, r"--workdir: the checkpoints in .* are another model's: .*float32"),
        (
            {"layer_decay": 0.9},
            {**CONFIG, "optimizer": {"layer_decay": 0.9}},
            r"config\.optimizer\.layer_decay: was absent, now 0\.9: .*opt_state/2 is missing",
        ),
        ({"average": True}, CONFIG, r"--workdir: .*ema/lm_head/kernel is missing in the check"),
    ],
)
def test_checkpoints_of_another_model_are_refused_by_array_and_setting(
    tmp_path, made, config, message
):
    """And are not set aside: nothing in them is damaged."""
    write(tmp_path, steps=(2, 4))
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{message}.*choose another --workdir$") as refused:
        restored(tmp_path, config=config, **made)
    assert len(str(refused.value).splitlines()) == 1
    assert everything(tmp_path) == before


def test_one_checkpoint_with_other_arrays_among_good_ones_is_damaged(tmp_path, caplog):
    write(tmp_path, steps=(2,))
    write(tmp_path / "other", steps=(4,), width=6)
    shutil.copytree(tmp_path / "other/checkpoints/4", tmp_path / "checkpoints/4")
    with caplog.at_level(logging.ERROR):
        assert int(restored(tmp_path).step) == 2
    (aside,) = (tmp_path / "unreadable_checkpoints").iterdir()
    assert aside.name.startswith("4-")


def test_another_identity_is_refused_by_its_setting(tmp_path):
    write(tmp_path)
    assert restored(tmp_path) is not None
    with pytest.raises(ConfigError, match=r"^config\.tokenizer: its content is not what .*--work"):
        restored(tmp_path, identity={"tokenizer": "5678"})


def test_an_old_run_without_an_identity_gets_one(tmp_path):
    write(tmp_path, identity={})
    assert "identity" not in checkpoint.saved_config(str(tmp_path))
    assert restored(tmp_path) is not None
    write(tmp_path, steps=(4,))
    assert checkpoint.saved_config(str(tmp_path))["identity"] == IDENTITY
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG  # a config that parses


def test_settings_are_compared_though_config_json_is_gone(tmp_path):
    first = jobs.parse_job(tiny.pretrain().to_dict())
    write(tmp_path, config=first)
    (tmp_path / "config.json").unlink()
    deeper = dataclasses.replace(first, model=dataclasses.replace(first.model, layers=3))
    with pytest.raises(ConfigError, match=r"^config\.model\.layers: was 2, now 3: differs from"):
        restored(tmp_path, config=deeper)


def test_settings_are_compared_though_the_checkpoints_own_are_damaged(tmp_path, caplog):
    write(tmp_path)
    (tmp_path / "checkpoints/2/config/metadata").write_bytes(b"\0" * 100)
    wider = {**CONFIG, "model": {"width": 6}}
    with pytest.raises(ConfigError, match=r"^config\.model\.width: was 4, now 6: the checkpoints"):
        restored(tmp_path, config=wider, width=6)
    (tmp_path / "config.json").write_text("[")
    with caplog.at_level(logging.ERROR):
        assert int(restored(tmp_path).step) == 2
    assert "are lost: not compared" in caplog.text


def test_what_reads_only_changes_nothing(tmp_path):
    """A save in progress, a damaged checkpoint and the record all stay: a run is writing them."""
    write(tmp_path, steps=(2, 4))
    for path in (tmp_path / "checkpoints/4/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    saving = tmp_path / "checkpoints/6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/2", saving)
    before = everything(tmp_path)
    assert int(restored(tmp_path, read_only=True).step) == 2
    assert everything(tmp_path) == before
    assert restored(tmp_path / "nothing", read_only=True) is None
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_deleted_while_it_is_read_gives_way_to_a_newer_one(tmp_path, monkeypatch):
    write(tmp_path, steps=(2,))
    read, calls = checkpoint.Checkpoints._read, []

    def read_late(self, step, shapes):
        calls.append(step)
        if step == 2:  # the run beside it has saved another and deleted this one
            shutil.move(tmp_path / "checkpoints/2", tmp_path / "gone")
            shutil.move(tmp_path / "newer/checkpoints/4", tmp_path / "checkpoints/4")
        return read(self, step, shapes)

    write(tmp_path / "newer", steps=(4,))
    monkeypatch.setattr(checkpoint.Checkpoints, "_read", read_late)
    assert int(restored(tmp_path, read_only=True).step) == 4
    assert calls == [2, 4]


def test_another_number_of_images_is_said_and_allowed(tmp_path, caplog):
    _, state = states()
    for images in (61, 70):
        checkpoints = checkpoint.Checkpoints(
            str(tmp_path), run=RUN, config=CONFIG, counts={"data.source": images}
        )
        with caplog.at_level(logging.WARNING):
            checkpoints.write_config()
        checkpoints.save(state, step=images)
        checkpoints.close()
    (line,) = caplog.messages
    assert line.startswith("config.data.source: 70 images, and 61 when the checkpoint was written")
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_classifier_keeps_the_names_of_its_classes():
    config = jobs.parse_job(tiny.classify().to_dict())
    cats = dataclasses.replace(config, labels=("cat", "dog"))
    dogs = dataclasses.replace(config, labels=("dog", "cat"))
    for was, now, refused in ((config, cats, False), (cats, cats, False), (cats, dogs, True)):
        changed = same_run.changes(same_run.as_json(to_dict(was)), now)
        if refused:
            with pytest.raises(ConfigError, match=r"^config\.labels: was \['cat', 'dog'\], now"):
                same_run.check_settings(changed, now, where="runs/a")
        else:
            same_run.check_settings(changed, now, where="runs/a")


def test_a_checkpoint_deleted_while_it_is_exported_is_one_line(tmp_path, monkeypatch):
    write(tmp_path)

    def gone(folder, **_):
        shutil.rmtree(folder.parent)
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    monkeypatch.setattr(native, "_restore", gone)
    with pytest.raises(ConfigError, match=r"^init: .*/checkpoints/2 was deleted while it was read"):
        native.read_params(str(tmp_path), name="init")


def test_when_a_setting_may_change():
    assert may_change(None, was=1, now=2)
    assert not may_change("shapes", was=1, now=2)
    assert may_change("presence", was=0.9, now=0.99)
    assert not may_change("presence", was=None, now=0.9)
    assert not may_change("presence", was=0.9, now=ABSENT, absent=ABSENT)
    assert may_change("unit", was=0.9, now=0.8)
    assert not may_change("unit", was=1.0, now=0.8)
    assert not may_change("unit", was=0.8, now=1)
    assert may_change("once", was=[], now=["cat"])
    assert not may_change("once", was=["cat"], now=["dog"])


def test_misfit_names_the_first_array_that_differs():
    here = {"params": {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "step": jnp.int32(0)}
    assert same_run.misfit(here, here) == ""
    other = {**here, "params": {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}}
    assert same_run.misfit(here, other) == (
        "params/a is float32[2] in the checkpoint, bfloat16[2] in this run"
    )


@pytest.mark.slow
def test_a_refused_change_leaves_a_run_as_it_was_and_a_moved_tokenizer_is_the_same(tmp_path):
    """Whatever refuses it: settings, arrays, tokens, or images that can't be read."""
    values = tiny.pretrain().to_dict()
    values["run"] |= {"steps": 2, "checkpoint_every": 2, "log_every": 2}
    values["optimizer"]["warmup_steps"] = 1
    values["tokenizer"] |= {"random_weights": False, "path": str(tmp_path / "a.safetensors")}
    values["data"]["augmentation_cycle"] = 2  # keeps tokens, which other ones must not replace
    config = jobs.parse_job(values)
    for seed, name in enumerate("ab"):
        params = open_tokenizer(config.tokenizer).init(jax.random.key(seed))
        save_params(tmp_path / f"{name}.safetensors", params, config=config.tokenizer)
    workdir = tmp_path / "run"
    jobs.run(values, workdir=str(workdir))
    kept = {path: data for path, data in everything(workdir).items() if "tfevents" not in str(path)}
    assert any("token_cache" in str(path) for path in kept)

    def changed(**sections):
        return {
            **values,
            "run": {**values["run"], "steps": 4},
            **{name: {**values[name], **section} for name, section in sections.items()},
        }

    for refused, message in (
        (changed(optimizer={"layer_decay": 0.9}), "config.optimizer.layer_decay: was 1.0, now 0.9"),
        (changed(tokenizer={"path": str(tmp_path / "b.safetensors")}), "config.tokenizer: its con"),
        (changed(data={"source": "folder:/nowhere"}), "config.data.source: "),
    ):
        with pytest.raises(ConfigError) as error:
            jobs.run(refused, workdir=str(workdir))
        assert str(error.value).startswith(message)
        assert len(str(error.value).splitlines()) == 1
        for path, data in kept.items():
            assert path.read_bytes() == data, (message, path)
        assert not (workdir / "run.lock").exists()

    (tmp_path / "a.safetensors").rename(tmp_path / "moved.safetensors")
    moved = changed(tokenizer={"path": str(tmp_path / "moved.safetensors")})
    assert jobs.run(moved, workdir=str(workdir))["steps"] == 4
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["tokenizer"]["path"] == str(tmp_path / "moved.safetensors")
