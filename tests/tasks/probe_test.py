"""The probe job end to end on coloured images, its settings and its table."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax.config import ConfigError, parse
from beit_jax.tasks import probe
from beit_jax.training import metrics
from beit_jax.weights import native
from configs import probe_base
from tests.evaluation.examples import CLASSES, write_encoder

TRAINING, HELD_OUT = 150, 50  # neither is a multiple of the batch
STEPS = 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return write_encoder(str(tmp_path_factory.mktemp("weights") / "encoder"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A folder of images: every class is noise around its own colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    colours = rng.uniform(40, 215, (CLASSES, 3))
    for number in range(TRAINING + HELD_OUT):
        label = number % CLASSES
        pixels = np.clip(colours[label] + rng.normal(size=(36, 36, 3)) * 25, 0, 255)
        (root / f"class {label}").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"class {label}" / f"{number}.png")
    return str(root)


def settings(encoder: str, folder: str = "", **changes) -> probe.ProbeConfig:
    """The recipe, small; `changes` name settings with __ for the dot."""
    values = probe_base.get_config()
    values.run.init_from = encoder
    values.run.steps = STEPS
    values.run.batch_size = 32
    values.run.log_every = 1
    values.run.eval_every = 4
    values.run.checkpoint_every = 4
    values.run.checkpoint_minutes = 0.0
    values.classes = 0
    values.neighbours.counts = (5, 11)
    values.data.source = f"folder:{folder}" if folder else f"embedded:{TRAINING}"
    values.data.eval_source = ""
    values.data.holdout = HELD_OUT
    values.data.image_size = 32
    values.data.workers = 2
    values.data.augment.min_crop_scale = 0.5
    values.data.augment.eval_crop = 1.0
    values.optimizer.learning_rate = 0.05
    values.optimizer.hold_steps = 4
    for name, value in changes.items():
        section = values
        *parents, last = name.split("__")
        for parent in parents:
            section = section[parent]
        section[last] = value
    return parse(probe.ProbeConfig, values.to_dict())


def losses(workdir) -> list[float]:
    return [line["loss"] for line in metrics.read(f"{workdir}/metrics.jsonl") if "loss" in line]


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def online(encoder, folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("online")
    return workdir, probe.run(settings(encoder, folder), workdir=str(workdir))


@pytest.fixture(scope="module")
def cached(encoder, folder, tmp_path_factory):
    """Features of two passes, used in turn: 10 batches for 12 steps."""
    workdir = tmp_path_factory.mktemp("cached")
    config = settings(encoder, folder, cached_views=2, neighbours__blocks=(2,))
    return workdir, probe.run(config, workdir=str(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_features_of_a_random_encoder_separate_colours(mode, request):
    workdir, summary = request.getfixturevalue(mode)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    linear = summary["linear"]
    assert linear["steps"] == STEPS
    assert list(linear["top1"]) == ["1", "2", "3"]
    assert linear["best"]["top1"] == max(linear["best_top1"].values()) > 0.5
    assert linear["best_top1"][str(linear["best"]["block"])] == linear["best"]["top1"]
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    evaluated = [line for line in lines if "eval_top1" in line]
    assert [line["step"] for line in evaluated] == [4, 8, 12]
    assert linear["best"]["top1"] == max(line["eval_top1"] for line in evaluated)
    assert evaluated[-1]["eval_top1_block_2"] == linear["top1"]["2"]
    # Of all 50 held-out images: even percents.
    shares = [50 * value for value in linear["top1"].values()]
    assert shares == pytest.approx(np.round(shares), abs=1e-4)
    kept = native.saved_config(str(workdir / "best"))["best"]
    assert (kept["value"], kept["step"]) == (linear["best"]["top1"], linear["best"]["step"])
    knn = summary["knn"]
    assert knn["best"]["accuracy"] > 0.5
    assert list(knn["accuracy"]) == (["1", "2", "3"] if mode == "online" else ["2"])


@pytest.mark.slow
def test_stored_features_repeat_the_first_passes(online, cached):
    """The same views as online for 10 batches, then again from the first; rounded to float16."""
    fresh, stored = losses(online[0]), losses(cached[0])
    np.testing.assert_allclose(stored[:10], fresh[:10], rtol=2e-3)
    assert not np.allclose(stored[10:], fresh[10:], rtol=2e-3)


class Crash(RuntimeError):
    pass


@pytest.mark.slow
def test_resume_is_bit_exact(encoder, folder, cached, tmp_path, monkeypatch):
    """Cut off at step 11 of 12, in the second turn; continued from 8."""
    train = probe.loop.train

    def crashing(job, **rest):
        def training(start):
            for step, batch in enumerate(job.feed.training(start), start):
                if step == 11:
                    raise Crash
                yield batch

        feed = dataclasses.replace(job.feed, training=training)
        return train(dataclasses.replace(job, feed=feed), **rest)

    config = settings(encoder, folder, cached_views=2, neighbours__blocks=(2,))
    with monkeypatch.context() as patched:
        patched.setattr(probe.loop, "train", crashing)
        with pytest.raises(Crash):
            probe.run(config, workdir=str(tmp_path))
    summary = probe.run(config, workdir=str(tmp_path))
    workdir, expected = cached
    assert losses(tmp_path) == losses(workdir)
    assert summary["linear"]["best_top1"] == expected["linear"]["best_top1"]
    assert summary["knn"] == expected["knn"]
    for continued, uninterrupted in zip(
        jax.tree.leaves(native.read_params(str(tmp_path))),
        jax.tree.leaves(native.read_params(str(workdir))),
        strict=True,
    ):
        np.testing.assert_array_equal(continued, uninterrupted)

    # The same command once more has nothing left to train, and finds the same.
    config = dataclasses.replace(config, neighbours=probe.KnnConfig(counts=()))
    again = probe.run(config, workdir=str(tmp_path))
    assert "knn" not in again
    assert again["linear"]["images_per_second"] is None
    assert again["linear"]["best"] == expected["linear"]["best"]


def test_the_table_has_a_row_for_each_block():
    summary = {
        "linear": {"top1": {"2": 0.25, "10": 0.5}, "best_top1": {"2": 0.3, "10": 0.5}},
        "knn": {"accuracy": {"10": {"5": 0.125, "20": 1.0}}},
    }
    lines = [line.split() for line in probe.table(summary).strip().splitlines()]
    assert lines[0] == ["block", "linear", "at", "its", "best", "5-NN", "20-NN"]
    assert lines[2:] == [
        ["2", "25.00%", "30.00%"],
        ["10", "50.00%", "50.00%", "12.50%", "100.00%"],
    ]


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__init_from": ""}, r"config\.run\.init_from: missing"),
        ({"run__init_allow_unused": ("head",)}, r"config\.run\.init_allow_unused: .*import"),
        ({"features": "cls"}, r"config\.features: must be one of mean, cls_mean"),
        ({"blocks": (0,)}, r"config\.blocks\[0\]: .*are numbered from 1"),
        ({"blocks": (2, 2)}, r"config\.blocks: one is there twice"),
        ({"neighbours__blocks": (0,)}, r"config\.neighbours\.blocks\[0\]: .*numbered"),
        ({"neighbours__counts": (0,)}, r"config\.neighbours\.counts\[0\]: must be at least 1"),
        ({"neighbours__temperature": 0.0}, r"config\.neighbours\.temperature: must be at least 0"),
        ({"linear": False, "neighbours__counts": ()}, r"config\.linear: false, and .* nothing"),
        ({"linear": False, "blocks": (2,)}, r"config\.blocks: \(2,\) would .* neighbours\.blocks"),
        ({"cached_views": -1}, r"config\.cached_views: must not be negative"),
        ({"optimizer__clip_norm": 1.0}, r"config\.optimizer\.clip_norm: must be None"),
        ({"optimizer__layer_decay": 0.5}, r"config\.optimizer\.layer_decay: must be 1"),
        ({"optimizer__ema_decay": 0.9}, r"config\.optimizer\.ema_decay: must be None"),
        ({"optimizer__warmup_steps": 99}, r"config\.optimizer\.warmup_steps: 99 is more"),
    ],
)
def test_an_invalid_setting_is_an_error_with_its_name(encoder, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(encoder, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (4,)}, r"config\.blocks: there is no block \[4\], the encoder has 3"),
        ({"neighbours__blocks": (9,)}, r"config\.neighbours\.blocks: there is no block \[9\]"),
        ({"neighbours__counts": (151,)}, r"config\.neighbours\.counts: .* 150 training images"),
        ({"classes": 7}, r"config\.classes: 7, but embedded:150 has 6"),
        ({"run__init_from": "/nowhere"}, r"config\.run\.init_from: .*/nowhere"),
        ({"data__image_size": 36}, r"config\.run\.init_from: .*36 is not a multiple"),
        ({"run__batch_size": 12}, r"config\.run\.batch_size: 12 does not divide"),
    ],
)
def test_settings_that_do_not_fit_stop_the_run_before_anything_is_written(
    encoder, tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        probe.run(settings(encoder, **changes), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_does_not_resume_with_other_features(encoder, cached):
    for name, changes in (("features", {"features": "mean"}), ("blocks", {"blocks": (1, 2)})):
        config = settings(encoder, **changes)
        with pytest.raises(ConfigError, match=rf"config\.{name}: was .* choose another --workdir"):
            probe.check_same_probe(config, workdir=str(cached[0]))
    probe.check_same_probe(settings(encoder), workdir=str(cached[0]))
    with pytest.raises(ConfigError, match=r"config\.run\.init_from: was .*'other'"):
        probe.check_same_probe(settings("other"), workdir=str(cached[0]))


def test_another_normalization_than_the_checkpoints_is_allowed_by_name_only(encoder, tmp_path):
    changes = {"data__normalization": "imagenet", "linear": False, "neighbours__blocks": (1,)}
    with pytest.raises(
        ConfigError, match=r"^config\.run\.init_from: .* normalization half, this run imagenet"
    ):
        probe.run(settings(encoder, **changes), workdir=str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    config = settings(encoder, **changes, run__init_allow_different=("normalization",))
    assert "knn" in probe.run(config, workdir=str(tmp_path / "allowed"))


def test_the_recipes_have_the_published_settings_and_every_key():
    """run_linear_eval.py; paper appendix D where it differs is said in the file."""

    def missing(values, section, path):
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if field.name not in section:
                yield f"{path}.{field.name}"
            elif dataclasses.is_dataclass(value):
                yield from missing(value, section[field.name], f"{path}.{field.name}")

    for name in ("probe_base", "probe_large"):
        section = importlib.import_module(f"configs.{name}").get_config().to_dict()
        config = parse(probe.ProbeConfig, section)
        assert not list(missing(config, section, name))
        assert config.run.steps == 125_100
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.weight_decay) == (4e-3, 1e-4)
        assert (optimizer.min_learning_rate, optimizer.warmup_steps) == (0.0, 0)
        assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 1e-8)
        assert optimizer.hold_steps == 1251
        augment = config.data.augment
        assert (augment.interpolation, augment.operations) == ("bilinear", 0)
        assert (augment.erase_probability, augment.eval_crop) == (0.0, None)
