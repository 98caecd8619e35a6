"""The probe against plain NumPy, on one device and eight, and end to end on coloured images."""

import dataclasses
import functools
import importlib
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax.config import ConfigError, ModelConfig, RunError, parse
from beit_jax.models.heads import masked_image_model
from beit_jax.tasks import probe
from beit_jax.training import metrics, optim, sharding, state
from beit_jax.weights import native
from beit_jax.weights.description import Description, to_config
from configs import probe_base

MODEL = ModelConfig(
    layers=3, width=32, heads=2, mlp_width=64, image_size=32, patch_size=8, dtype="float32"
)
TRAINING, HELD_OUT, CLASSES = 150, 50, 10  # neither is a multiple of the batch
STEPS = 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A checkpoint of a pre-training run with random weights.

    Larger ones than at the start of training: there all images have nearly the same features.
    """
    path = str(tmp_path_factory.mktemp("weights") / "encoder")
    params = jax.jit(masked_image_model(MODEL, vocabulary=16).init)(jax.random.key(0))
    params = jax.tree.map(lambda each: 3 * each, params)
    native.write_params(
        path, params, config=to_config(Description(task="pretrain", model=MODEL, outputs=16))
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A folder of images, each class noise about a colour of its own."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    colours = rng.uniform(40, 215, (CLASSES, 3))
    for number in range(TRAINING + HELD_OUT):
        name = number % CLASSES
        pixels = np.clip(colours[name] + rng.normal(size=(36, 36, 3)) * 25, 0, 255)
        (root / f"class {name}").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"class {name}" / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module")
def frozen(encoder) -> probe.FrozenEncoder:
    return probe.load_encoder(encoder)


def compute(frozen, images, **settings):
    """`block_features`, compiled."""
    function = functools.partial(probe.block_features, frozen.functions, **settings)
    return jax.jit(function)(frozen.params, images)


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


# ---------------------------------------------------------------------------- features


def test_features_by_hand(frozen, monkeypatch):
    """Raw block outputs, counted from 1, in float64; whole, and in pieces of one image a device."""
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    hidden_states = functools.partial(frozen.functions.apply, method="hidden_states")
    states = np.asarray(jax.jit(hidden_states)(frozen.params, images), np.float64)
    for at_once, kind in ((probe.IMAGES_AT_ONCE, "mean"), (1, "cls_mean")):
        monkeypatch.setattr(probe, "IMAGES_AT_ONCE", at_once)
        ours = np.asarray(compute(frozen, images, blocks=(3, 1), kind=kind))
        for i, block in enumerate((3, 1)):
            for image in range(16):
                tokens = states[block, image]
                expected = tokens[1:].mean(axis=0)
                if kind == "cls_mean":
                    expected = np.concatenate([tokens[0], expected])
                np.testing.assert_allclose(ours[image, i], expected, rtol=1e-4, atol=1e-5)


def test_the_mask_token_and_the_final_norm_are_left_out(encoder, frozen):
    assert {"mask_token", "norm"} & set(frozen.params) == set()
    stored = native.read_params(encoder)["encoder"]
    np.testing.assert_array_equal(frozen.params["cls_token"], stored["cls_token"])
    assert set(stored) - set(frozen.params) == {"mask_token", "norm"}


def test_positions_are_resized_to_the_images(encoder):
    frozen = probe.load_encoder(encoder, image_size=48)
    assert frozen.model.grid == 6
    images = np.zeros((2, 48, 48, 3), np.float32)
    features = compute(frozen, images, blocks=(1,), kind="mean")
    assert features.shape == (2, 1, 32)


# ---------------------------------------------------------------------------- linear


def random_batch(*, images=12, blocks=2, width=64):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    labels[4] = -1  # could not be decoded
    valid = np.arange(images) < 9
    features = rng.normal(size=(images, blocks, width)).astype(np.float32)
    return {"features": features, "label": labels, "valid": valid}


def tiny_task(encoder, frozen, *, blocks=(1, 3)):
    config = dataclasses.replace(settings(encoder), classes=CLASSES)
    task = probe.probe_task(frozen, config=config, blocks=blocks)
    return task, task.init(jax.random.key(1))


def gradients(task, params, batch):
    def loss(params, batch):
        return task.loss(params, task.prepare(task.frozen, batch, None), None, None)

    return jax.jit(jax.grad(loss, has_aux=True))(params, batch)


def test_loss_accuracy_and_gradients_by_hand(encoder, frozen):
    """Softmax regression in float64, each block on its own; padding and unlabelled left out."""
    task, params = tiny_task(encoder, frozen)
    kernel = np.asarray(params["probe"]["kernel"], np.float64)
    assert kernel.shape == (2, 64, CLASSES)
    assert kernel.std() == pytest.approx(0.01, rel=0.1)
    assert not params["probe"]["bias"].any()
    batch = random_batch()
    sums = jax.jit(task.evaluate)(params, task.frozen, batch)
    gradient, trained = gradients(task, params, batch)

    counted = batch["valid"] & (batch["label"] >= 0)
    labels = batch["label"][counted]
    total, rows = 0.0, np.arange(len(labels))
    for block in range(2):
        x = batch["features"][counted, block].astype(np.float64)
        logits = x @ kernel[block]
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        total -= np.log(shares[rows, labels]).sum()
        shares[rows, labels] -= 1
        ours = gradient["probe"]
        np.testing.assert_allclose(ours["kernel"][block], x.T @ shares, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours["bias"][block], shares.sum(axis=0), rtol=1e-4, atol=1e-5)
        assert sums["right"][block] == (logits.argmax(axis=1) == labels).sum()
    assert sums["weight"] == trained["weight"] == counted.sum() == 8
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)
    named = task.metrics(sums)
    assert set(named) == {"loss", "top1", "top1_block_1", "top1_block_3"}
    assert named["top1"] == max(named["top1_block_1"], named["top1_block_3"])


def test_a_block_does_not_see_the_others(encoder, frozen):
    """Other features and weights there, the same gradient here, to the last bit."""
    task, params = tiny_task(encoder, frozen)
    batch = random_batch()
    before = gradients(task, params, batch)[0]["probe"]
    params["probe"]["kernel"] = params["probe"]["kernel"].at[1].multiply(7.0)
    batch["features"][:, 1] += 5.0
    after = gradients(task, params, batch)[0]["probe"]
    np.testing.assert_array_equal(before["kernel"][0], after["kernel"][0])
    np.testing.assert_array_equal(before["bias"][0], after["bias"][0])
    assert not np.allclose(before["kernel"][1], after["kernel"][1])


# ---------------------------------------------------------------------------- k-NN


def brute_force(bank, names, queries, *, counts, temperature):
    """Votes in float64, one query at a time."""
    bank, names = bank[names >= 0].astype(np.float64), names[names >= 0]
    result = np.zeros((len(queries), len(counts)), int)
    for row, query in enumerate(queries.astype(np.float64)):
        similarity = bank @ query
        order = np.argsort(-similarity)
        for column, count in enumerate(counts):
            votes = np.zeros(CLASSES)
            for neighbour in order[:count]:
                votes[names[neighbour]] += np.exp(similarity[neighbour] / temperature)
            result[row, column] = votes.argmax()
    return result


def meshes():
    return {n: sharding.make_mesh(fsdp=min(n, 2), devices=jax.devices()[:n]) for n in (1, 8)}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [3, 4096])
def test_votes_equal_brute_force(devices, rows, monkeypatch):
    """In many small chunks (fewer rows in one than there are neighbours) and in one."""
    monkeypatch.setattr(probe, "BANK_ROWS", rows)
    rng = np.random.default_rng(5)
    bank = rng.normal(size=(203, 12)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    names = rng.integers(0, CLASSES, 203).astype(np.int32)
    names[rng.permutation(203)[:20]] = -1
    queries = rng.normal(size=(40, 12)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    bank[np.flatnonzero(names < 0)[:5]] = queries[:5]  # the very nearest, but without a vote

    mesh = meshes()[devices]
    placed = probe.split_bank(bank, names, mesh=mesh)
    for temperature in (0.07, 1.0, 0.005):
        vote = {"counts": (1, 5, 20), "temperature": temperature}
        ours = jax.jit(
            lambda b, n, q, vote=vote: probe.weighted_vote(
                b, n, q, mesh=mesh, classes=CLASSES, **vote
            )
        )(placed["features"], placed["label"], queries)
        np.testing.assert_array_equal(ours, brute_force(bank, names, queries, **vote))


def test_more_neighbours_than_images():
    """All of them vote, and nothing else."""
    bank = np.eye(3, dtype=np.float32)
    mesh = meshes()[8]
    placed = probe.split_bank(bank, np.array([4, 2, 2], np.int32), mesh=mesh)
    query = np.array([[0.8, 0.45, 0.4]], np.float32)
    query /= np.linalg.norm(query)
    for temperature, winner in ((0.05, 4), (10.0, 2)):
        vote = functools.partial(
            probe.weighted_vote,
            mesh=mesh,
            counts=(20,),
            temperature=temperature,
            classes=CLASSES,
        )
        named = jax.jit(vote)(placed["features"], placed["label"], query)
        assert named.tolist() == [[winner]]


def test_knn_accuracy_equals_brute_force_on_one_device_and_eight(frozen):
    """From images to accuracy; padding and unlabelled images neither vote nor count."""
    rng = np.random.default_rng(2)

    def batches(count, *, valid):
        """Noise about a colour of its own for each class; `valid` images, the rest is padding."""
        labels = rng.integers(0, CLASSES, count).astype(np.int32)
        levels = 40 + 18 * labels[:, None, None, None] + rng.normal(size=(count, 32, 32, 3)) * 30
        images = np.clip(levels, 0, 255).astype(np.uint8)
        labels[3] = -1
        real = np.arange(count) < valid
        return [
            {"image": images[i : i + 16], "label": labels[i : i + 16], "valid": real[i : i + 16]}
            for i in range(0, count, 16)
        ]

    bank, queries = batches(64, valid=61), batches(48, valid=39)
    config = probe.KnnConfig(counts=(1, 7), temperature=0.1, blocks=(1, 3))
    accuracy = {
        n: probe.knn_accuracy(
            frozen.functions,
            frozen.params,
            bank=bank,
            queries=queries,
            classes=CLASSES,
            features="cls_mean",
            config=config,
            mesh=mesh,
        )
        for n, mesh in meshes().items()
    }
    assert accuracy[1] == accuracy[8]

    def features(batches):
        images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
        labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
        pixels = jnp.asarray(images / 127.5 - 1, jnp.float32)
        raw = compute(frozen, pixels, blocks=(1, 3), kind="cls_mean")
        unit = raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)
        return np.asarray(unit).astype(probe.STORED).astype(np.float64), labels

    (known, names), (asked, truth) = features(bank), features(queries)
    for i, block in enumerate((1, 3)):
        named = brute_force(known[:, i], names, asked[:, i], counts=(1, 7), temperature=0.1)
        expected = (named == truth[:, None])[truth >= 0].mean(axis=0)
        assert list(accuracy[8][block]) == [1, 7]
        np.testing.assert_allclose(list(accuracy[8][block].values()), expected, atol=1e-6)
        assert accuracy[8][block][7] > 0.3  # there is something to find


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
def test_a_random_encoder_tells_colours(mode, request):
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
def test_stored_features_are_those_of_the_first_passes(online, cached):
    """The same views as online for 10 batches, then again from the first; rounded to float16."""
    fresh, stored = losses(online[0]), losses(cached[0])
    np.testing.assert_allclose(stored[:10], fresh[:10], rtol=2e-3)
    assert not np.allclose(stored[10:], fresh[10:], rtol=2e-3)


@pytest.mark.slow
def test_stored_features_equal_those_of_the_train_step(encoder, frozen):
    """Erased boxes included: they follow the seed and the step."""
    config = settings(encoder, data__augment__erase_probability=1.0, run__seed=3)
    config = dataclasses.replace(config, classes=CLASSES)
    mesh = sharding.make_mesh(fsdp=2)
    stored = probe.feature_function(frozen, config=config, blocks=(1, 3), mesh=mesh)
    task = probe.probe_task(frozen, config=config, blocks=(1, 3))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8),
        "label": np.zeros(16, np.int32),
    }
    seen = []

    def observe(params, prepared, key, step):
        del key, step
        jax.debug.callback(lambda features: seen.append(np.asarray(features)), prepared["features"])
        return params["probe"]["bias"].sum(), {"loss": 0.0, "weight": 1.0}

    task = dataclasses.replace(task, loss=observe)
    optimizer = optim.adamw(config.optimizer)
    before = state.state_from_params(task.init(jax.random.key(0)), optimizer=optimizer)
    step = functools.partial(
        state.train_step,
        task=task,
        config=config.optimizer,
        optimizer=optimizer,
        schedule=lambda step: 0.0,
        seed=config.run.seed,
    )
    jax.jit(step)(dataclasses.replace(before, step=jnp.int32(5)), task.frozen, batch)
    jax.effects_barrier()
    ours = stored(batch, 5)
    assert ours.dtype == np.float16
    np.testing.assert_allclose(ours, seen[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(stored(batch, 6), seen[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(stored(batch, None), seen[0], rtol=1e-3, atol=1e-4)


class Crash(RuntimeError):
    pass


@pytest.mark.slow
def test_resume_is_bit_exact(encoder, folder, cached, tmp_path, monkeypatch):
    """Cut off at step 11 of 12, in the second turn; continued from 8."""
    train = probe.loop.train

    def crashing(task, feed, **rest):
        def training(start):
            for step, batch in enumerate(feed.training(start), start):
                if step == 11:
                    raise Crash
                yield batch

        return train(task, dataclasses.replace(feed, training=training), **rest)

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
    for ours, theirs in zip(
        jax.tree.leaves(native.read_params(str(tmp_path))),
        jax.tree.leaves(native.read_params(str(workdir))),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)

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
        ({"blocks": (0,)}, r"config\.blocks: they are numbered from 1"),
        ({"blocks": (2, 2)}, r"config\.blocks: one is there twice"),
        ({"neighbours__blocks": (0,)}, r"config\.neighbours\.blocks: they are numbered"),
        ({"neighbours__counts": (0,)}, r"config\.neighbours\.counts: each must be"),
        ({"neighbours__temperature": 0.0}, r"config\.neighbours\.temperature: must be positive"),
        ({"linear": False, "neighbours__counts": ()}, r"config\.linear: false, and .* nothing"),
        ({"cached_views": -1}, r"config\.cached_views: must not be negative"),
        ({"optimizer__clip_norm": 1.0}, r"config\.optimizer\.clip_norm: must be None"),
        ({"optimizer__layer_decay": 0.5}, r"config\.optimizer\.layer_decay: must be 1"),
        ({"optimizer__ema_decay": 0.9}, r"config\.optimizer\.ema_decay: must be None"),
        ({"optimizer__warmup_steps": 99}, r"config\.optimizer\.warmup_steps: 99 is more"),
    ],
)
def test_bad_settings_are_named(encoder, changes, message):
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
def test_what_does_not_fit_stops_before_anything_is_written(encoder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        probe.run(settings(encoder, **changes), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_classifiers_of_other_features_are_not_continued(encoder, cached):
    for name, changes in (("features", {"features": "mean"}), ("blocks", {"blocks": (1, 2)})):
        config = settings(encoder, **changes)
        with pytest.raises(ConfigError, match=rf"config\.{name}: was .* choose another --workdir"):
            probe.check_same_probe(config, workdir=str(cached[0]))
    probe.check_same_probe(settings(encoder), workdir=str(cached[0]))
    with pytest.raises(ConfigError, match=r"config\.run\.init_from: was .*'other'"):
        probe.check_same_probe(settings("other"), workdir=str(cached[0]))


def test_other_pixels_than_the_checkpoints_are_shouted_about(encoder, frozen, caplog):
    for normalization, said in (("half", False), ("imagenet", True)):
        with caplog.at_level(logging.WARNING):
            probe.compare_normalization(
                frozen, settings(encoder, data__normalization=normalization).data
            )
        assert ("THE CHECKPOINT EXPECTS PIXELS NORMALISED BY 'half'" in caplog.text) == said


def test_features_beyond_float16_are_an_error():
    feed = probe.loop.Feed(
        training=lambda start: iter([{"image": np.zeros(2), "label": np.zeros(2)}]),
        evaluation=lambda: [],
        metrics=dict,
    )
    computed = np.zeros((2, 2, 3), np.float16)
    computed[1, 1, 0] = np.inf
    stored = probe.stored_feed(
        feed, lambda batch, step: computed, steps=1, blocks=(4, 9), width=3, batch_size=2
    )
    with pytest.raises(RunError, match=r"features of block \[9\] are not finite in float16"):
        next(stored.training(0))


def test_the_recipes_numbers_and_that_all_can_be_overridden():
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
