"""The linear probe against softmax regression in NumPy, and the features it stores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import OptimizerConfig, RunError
from beit_jax.evaluation import linear_probe
from beit_jax.evaluation.features import FeatureSpec
from beit_jax.training import loop, optim, sharding, state
from tests.evaluation.examples import CLASSES


def random_batch(*, images=12, blocks=2, width=64):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    labels[4] = -1  # could not be decoded
    valid = np.arange(images) < 9
    features = rng.normal(size=(images, blocks, width)).astype(np.float32)
    return {"features": features, "label": labels, "valid": valid}


def tiny_task(frozen):
    spec = FeatureSpec(blocks=(1, 3), kind="cls_mean")
    task = linear_probe.probe_task(frozen, spec=spec, classes=CLASSES)
    return task, task.init(jax.random.key(1))


def gradients(task, params, batch):
    def loss(params, batch):
        return task.loss(params, task.prepare(task.frozen, batch, None), None, None)

    return jax.jit(jax.grad(loss, has_aux=True))(params, batch)


@pytest.mark.slow
def test_loss_accuracy_and_gradients_equal_softmax_regression(frozen):
    """In float64, each block on its own; padding and unlabelled images do not count."""
    task, params = tiny_task(frozen)
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
        probe = gradient["probe"]
        np.testing.assert_allclose(probe["kernel"][block], x.T @ shares, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probe["bias"][block], shares.sum(axis=0), rtol=1e-4, atol=1e-5)
        assert sums["correct"][block] == (logits.argmax(axis=1) == labels).sum()
    assert sums["weight"] == trained["weight"] == counted.sum() == 8
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)
    metrics = task.metrics(sums)
    assert set(metrics) == {"loss", "top1", "top1_block_1", "top1_block_3"}
    assert metrics["top1"] == max(metrics["top1_block_1"], metrics["top1_block_3"])


@pytest.mark.slow
def test_blocks_do_not_influence_one_another(frozen):
    """Other features and weights of one block leave the other's gradient bit-identical."""
    task, params = tiny_task(frozen)
    batch = random_batch()
    before = gradients(task, params, batch)[0]["probe"]
    params["probe"]["kernel"] = params["probe"]["kernel"].at[1].multiply(7.0)
    batch["features"][:, 1] += 5.0
    after = gradients(task, params, batch)[0]["probe"]
    np.testing.assert_array_equal(before["kernel"][0], after["kernel"][0])
    np.testing.assert_array_equal(before["bias"][0], after["bias"][0])
    assert not np.allclose(before["kernel"][1], after["kernel"][1])


@pytest.mark.slow
def test_stored_features_equal_the_train_steps(frozen):
    """Erased boxes included: they follow the seed and the step."""
    spec = FeatureSpec(blocks=(1, 3), kind="cls_mean", erase_probability=1.0)
    mesh = sharding.make_mesh(fsdp=2)
    stored = linear_probe.feature_function(frozen, spec=spec, seed=3, mesh=mesh)
    task = linear_probe.probe_task(frozen, spec=spec, classes=CLASSES)
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=0, clip_norm=None)
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
    optimizer = optim.adamw(config)
    before = state.state_from_params(task.init(jax.random.key(0)), optimizer=optimizer)
    step = functools.partial(
        state.train_step,
        task=task,
        config=config,
        optimizer=optimizer,
        schedule=lambda step: 0.0,
        seed=3,
    )
    jax.jit(step)(dataclasses.replace(before, step=jnp.int32(5)), task.frozen, batch)
    jax.effects_barrier()
    features = stored(batch, 5)
    assert features.dtype == np.float16
    np.testing.assert_allclose(features, seen[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(stored(batch, 6), seen[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(stored(batch, None), seen[0], rtol=1e-3, atol=1e-4)


def test_features_beyond_float16_are_an_error():
    feed = loop.Feed(
        training=lambda start: iter([{"image": np.zeros(2), "label": np.zeros(2)}]),
        evaluation=lambda: [],
        metrics=dict,
    )
    computed = np.zeros((2, 2, 3), np.float16)
    computed[1, 1, 0] = np.inf
    stored = linear_probe.stored_feed(feed, lambda batch, step: computed, steps=1, blocks=(4, 9))
    with pytest.raises(RunError, match=r"features of block \[9\] are not finite in float16"):
        next(stored.training(0))
