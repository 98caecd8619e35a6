"""Fine-tuning end to end: figures that hold, whatever the batch; starts, stops and bad settings."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from PIL import Image

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.models.heads import classifier
from beit_jax.tasks import classify
from beit_jax.tasks.feed import labelled_feed
from beit_jax.training import loop, sharding
from beit_jax.weights import native
from beit_jax.weights.convert import export_checkpoint
from tests.tasks import tiny

SHADES = ("dark", "middle", "light")


def shades(folder, *, number, seed):
    """A class is a brightness: pictures in class folders, of different sizes."""
    rng = np.random.default_rng(seed)
    for index in range(number):
        name = SHADES[index % 3]
        height, width = rng.integers(30, 60, 2)
        base = 40 + 85 * (index % 3)
        noise = rng.integers(-30, 30, (height, width, 3))
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(
            folder / name / f"{index}.png"
        )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shades")
    return shades(root / "train", number=48, seed=0), shades(root / "test", number=29, seed=1)


def settings(folders=None, **changes):
    """`tiny.classify`; changes by path, with two underscores for a dot."""
    config = tiny.classify()
    if folders:
        config.data.source, config.data.eval_source = (f"folder:{folder}" for folder in folders)
        config.data.holdout = 0
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        node = config
        for part in section.split("__") if section else ():
            node = node[part]
        node[key] = value
    return config.to_dict()


def run(values, workdir):
    return jobs.run(values, workdir=str(workdir))


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run on brightness, which is quickly learned, with an average beside it."""
    workdir = tmp_path_factory.mktemp("classify") / "run"
    values = settings(
        folders,
        run__steps=40,
        run__eval_every=10,
        data__augment__operations=0,
        optimizer__ema_decay=0.8,
        optimizer__layer_decay=1.0,
        mixing__mixup=0.0,
        mixing__cutmix=0.0,
    )
    return values, workdir, run(values, workdir)


def read_images(folder, config):
    """Held-out images and labels in order, one by one, without the batches."""
    feed, classes = labelled_feed(config.data, run=dataclasses.replace(config.run, batch_size=1))
    assert classes == tuple(sorted(SHADES))
    return list(feed.evaluation())


@pytest.mark.slow
def test_it_learns_and_the_figures_hold(trained, folders):
    """Top-1, top-5 and loss of the summary, recomputed image by image in NumPy."""
    values, workdir, summary = trained
    assert summary["top1"] > 0.8  # a third by chance
    config = jobs.parse_job(values)
    model = classifier(config.model, classes=3)
    params = native.read_params(str(workdir))
    apply = jax.jit(model.apply)
    right, losses = [], []
    for batch in read_images(folders[1], config):
        assert batch["valid"].all()
        logits = apply(params, batch["image"].astype(np.float32) / 127.5 - 1)
        row, label = np.asarray(logits[0], np.float64), int(batch["label"][0])
        right.append(row.argmax() == label)
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    assert len(right) == 29
    assert np.mean(right) == pytest.approx(summary["top1"], abs=1e-6)
    assert np.mean(losses) == pytest.approx(summary["loss"], rel=1e-4)
    assert summary["top5"] == 1  # of three


@pytest.mark.slow
def test_any_batch_size_and_number_of_devices_evaluate_alike(trained):
    """29 images: no batch size here divides them but 1. The run's was 8, on 8 devices."""
    values, workdir, summary = trained
    params = native.read_params(str(workdir))
    results = []
    for batch_size, devices in ((16, 8), (24, 2), (7, 1), (29, 1)):
        changed = values | {"run": values["run"] | {"batch_size": batch_size}}
        changed["mixing"] = values["mixing"] | {"groups": 1}
        config = jobs.parse_job(changed)
        feed, classes = labelled_feed(config.data, run=config.run)
        config = classify.with_classes(config, classes)
        task = classify.classify_task(classifier(config.model, classes=3), config=config)
        mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
        sums = jax.jit(
            loop.state.stateful_evaluate(task),
            out_shardings=NamedSharding(mesh, sharding.REPLICATED),
        )
        placed = jax.device_put(params, NamedSharding(mesh, sharding.REPLICATED))
        results.append(loop.run_evaluation(sums, task, feed, {}, mesh, placed, {}))
    for result in results:
        assert result["top1"] == pytest.approx(summary["top1"], abs=1e-6)
        assert result["top5"] == pytest.approx(summary["top5"], abs=1e-6)
        assert result["loss"] == pytest.approx(summary["loss"], rel=1e-5)


@pytest.mark.slow
def test_best_and_average_are_kept(trained):
    values, workdir, summary = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    scores = [
        (line["eval_top1"], line["eval_ema_top1"], line["step"])
        for line in lines
        if "eval_top1" in line
    ]
    assert [step for _, _, step in scores] == [10, 20, 30, 40]
    best = summary["best"]
    assert best["value"] == max(max(score[:2]) for score in scores)
    assert best["step"] == next(step for *tops, step in scores if max(tops) == best["value"])
    assert native.saved_config(str(workdir / "best"))["labels"] == sorted(SHADES)

    # The average is its own definition's, and what is called best evaluates as said.
    changed = values | {"evaluate_only": True}
    changed["run"] = values["run"] | {"init_from": str(workdir / "best")}
    changed["optimizer"] = values["optimizer"] | {"ema_decay": None}
    again = run(changed, workdir.parent / "again")
    assert again["top1"] == pytest.approx(best["value"], abs=1e-6)
    assert json.loads((workdir.parent / "again/evaluation.json").read_text()) == again


@pytest.mark.slow
def test_the_average_follows_the_parameters():
    """e ← d e + (1 - d) p after each of five steps, by hand from the same run without average."""
    steps, decay = 5, 0.7
    values = settings(run__steps=steps, optimizer__ema_decay=decay)
    config = classify.with_classes(jobs.parse_job(values), ("a", "b"))
    task = classify.classify_task(classifier(config.model, classes=2), config=config)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (8, 32, 32, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 2, 8), jnp.int32),
    }
    optimizer = loop.optim.adamw(config.optimizer)
    train_state = loop.state.init_state(task, optimizer, jax.random.key(0), average=True)
    step = jax.jit(
        functools.partial(
            loop.state.train_step,
            task=task,
            config=config.optimizer,
            optimizer=optimizer,
            schedule=lambda count: jnp.asarray(1e-2),
            seed=0,
        )
    )
    expected = train_state.params
    for _ in range(steps):
        train_state, _ = step(train_state, {}, batch)
        expected = jax.tree.map(
            lambda e, p: decay * e + (1 - decay) * p, expected, train_state.params
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        train_state.ema,
        expected,
    )
    moved = jax.tree.map(lambda e, p: float(jnp.abs(e - p).max()), expected, train_state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(folders, tmp_path):
    """With mixing, erasing, RandAugment, drop path, average and two micro-batches."""
    values = settings(
        folders,
        run__steps=12,
        run__checkpoint_every=5,
        run__keep_checkpoints=5,
        run__eval_every=4,
        optimizer__ema_decay=0.9,
        optimizer__accumulate=2,
        run__batch_size=16,
        data__repeats=3,
    )
    straight = run(values, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for step in ("10", "12"):
        shutil.rmtree(tmp_path / "again/checkpoints" / step)
    again = run(values, tmp_path / "again")
    for name in ("top1", "loss", "ema_top1", "ema_loss", "best"):
        assert again[name] == straight[name], name
    first, second = (native.read_params(str(tmp_path / name)) for name in ("straight", "again"))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_starts_from_pre_training_and_is_exported(folders, tmp_path):
    """From a run of this project's pre-training, with copies of its table; to Hugging Face."""
    pretrain = tiny.pretrain()
    pretrain.run.steps = 1
    pretrain.data.normalization = "half"  # as the fine-tuning's
    pretrain.optimizer.warmup_steps = 1
    run(pretrain.to_dict(), tmp_path / "pretrain")
    values = settings(
        folders,
        run__steps=1,
        run__init_from=str(tmp_path / "pretrain"),
        optimizer__warmup_steps=1,
    )
    # With the rate 0 of the first warm-up step the weights stay what they were.
    run(values, tmp_path / "run")
    before = native.read_params(str(tmp_path / "pretrain"))["encoder"]
    after = native.read_params(str(tmp_path / "run"))
    table = after["encoder"]["blocks"]["attention"]["relative_position_bias"]["table"]
    for block in table:
        np.testing.assert_array_equal(block, before["relative_position_bias"]["table"])
    np.testing.assert_array_equal(
        after["encoder"]["blocks"]["mlp"]["fc1"]["kernel"], before["blocks"]["mlp"]["fc1"]["kernel"]
    )
    np.testing.assert_array_equal(after["fc_norm"]["scale"], 1)
    assert np.abs(after["head"]["kernel"]).max() < 1e-3  # head_init_scale

    exported = tmp_path / "hf"
    export_checkpoint(str(tmp_path / "run"), format="hugging_face", output=str(exported))
    written = json.loads((exported / "config.json").read_text())
    assert written["id2label"] == {"0": "dark", "1": "light", "2": "middle"}

    values["run"]["init_allow_missing"] = ()
    with pytest.raises(ConfigError, match=r"missing.*fc_norm"):
        run(values, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 7}, "config.classes: 7, but folder:.* has 3"),
        ({"mixing__groups": 3}, "config.mixing.groups: 3 does not divide run.batch_size, 8"),
        ({"pooling": "max"}, "config.pooling: must be one of mean, cls"),
        ({"evaluate_only": True}, "config.run.init_from: nothing to evaluate"),
        ({"label_smoothing": 1.0}, "config.label_smoothing"),
    ],
)
def test_wrong_settings_are_named(folders, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(folders, **changes), tmp_path / "run")


def test_images_without_classes_or_with_others_are_refused(folders, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (folders[0] / "dark").iterdir():
        shutil.copy(path, flat)
    values = settings(folders)
    values["data"]["source"] = values["data"]["eval_source"] = f"folder:{flat}"
    with pytest.raises(ConfigError, match=r"data.source: its images have no classes"):
        run(values, tmp_path / "run")

    less = tmp_path / "less"
    shutil.copytree(folders[1] / "dark", less / "dark")
    shutil.copytree(folders[1] / "light", less / "lihgt")
    values = settings((folders[0], less))
    with pytest.raises(
        ConfigError, match=r"eval_source: .*only there: light, middle; only here: lihgt"
    ):
        run(values, tmp_path / "run")


@pytest.mark.slow
def test_cls_pooling_trains(folders, tmp_path):
    values = settings(folders, run__steps=2, pooling="cls", optimizer__warmup_steps=1)
    run(values, tmp_path / "run")
    params = native.read_params(str(tmp_path / "run"))
    assert "fc_norm" not in params
    assert "norm" in params["encoder"]


def test_undecodable_images_do_not_count(folders, tmp_path):
    """Among the held-out images one is broken: the others' accuracy is what is reported."""
    broken = tmp_path / "test"
    shutil.copytree(folders[1], broken)
    (broken / "dark" / "0.png").write_bytes(b"not an image")
    values = settings((folders[0], broken))
    config = jobs.parse_job(values)
    feed, _ = labelled_feed(config.data, run=config.run)
    assert sum(batch["valid"].sum() for batch in feed.evaluation()) == 28
