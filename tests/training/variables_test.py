"""State that no gradient trains: BatchNorm's running statistics, a codebook that follows a mean."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from beit_jax.config import OptimizerConfig, RunConfig
from beit_jax.models.functional import functional
from beit_jax.training import checkpoint, loop, optim, sharding
from beit_jax.training.state import Task, TrainState, init_state, state_shapes, train_step

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
RUN = RunConfig(steps=4, batch_size=16, log_every=1, checkpoint_every=2, checkpoint_minutes=0.0)
WIDTH, CODES, MOMENTUM = 4, 3, 0.9


class Normalised(nnx.Module):
    """A linear layer between two normalisations, as a segmentation head has them."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.head(self.norm(x, use_running_average=not train))


class Codebook(nnx.Module):
    """A linear map whose outputs are quantised by codes that follow their moving average."""

    def __init__(self, rngs: nnx.Rngs):
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.codes = nnx.Variable(8 * jax.random.normal(rngs.params(), (CODES, 2)))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        z = self.head(x)
        distances = jnp.square(z[:, None] - self.codes[...]).sum(-1)
        chosen = jax.nn.one_hot(distances.argmin(1), CODES)
        quantised = z + jax.lax.stop_gradient(chosen @ self.codes[...] - z)
        if train:
            mean = (chosen.T @ z) / jnp.maximum(chosen.sum(0), 1)[:, None]
            moved = MOMENTUM * self.codes[...] + (1 - MOMENTUM) * mean
            self.codes[...] = jnp.where(chosen.sum(0)[:, None] > 0, moved, self.codes[...])
        return quantised.sum(-1, keepdims=True)


def regression(module: type[nnx.Module] = Normalised) -> Task:
    model = functional(module)

    def sums(predicted, batch):
        return {"loss": jnp.square(predicted[:, 0] - batch["y"]).sum(), "weight": batch["y"].size}

    def loss(params, variables, batch, key, step):
        predicted, variables = model.apply_and_update(params, variables, batch["x"], train=True)
        result = sums(predicted, batch)
        return result["loss"], result, variables

    def evaluate(params, variables, frozen, batch):
        return sums(model.apply(params, batch["x"], variables=variables, train=False), batch)

    return Task(
        init=model.init,
        init_variables=model.init_variables,
        prepare=lambda frozen, batch, key: batch,
        loss=loss,
        evaluate=evaluate,
        metrics=lambda totals: {"loss": totals["loss"] / totals["weight"]},
        frozen={},
        flops_per_image=1.0,
        sharding_rules=((r"norm/(scale|bias)$", sharding.REPLICATED),),
    )


def batch_of(step: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(step).normal(3.0, 2.0, (16, WIDTH)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def steps(
    *, devices=1, fsdp=1, accumulate=1, count=3, module=Normalised, spoil=None, ema_decay=None
) -> tuple[TrainState, TrainState]:
    """The state before and after `count` steps."""
    task = regression(module)
    config = dataclasses.replace(OPTIMIZER, accumulate=accumulate, ema_decay=ema_decay)
    optimizer = optim.adamw(config)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
    shapes = state_shapes(task, optimizer, mesh, average=ema_decay is not None)
    placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = functools.partial(init_state, task, optimizer, average=ema_decay is not None)
    first = state = jax.jit(fresh, out_shardings=placements)(jax.random.key(0))
    step = jax.jit(
        functools.partial(
            train_step,
            task=task,
            config=config,
            optimizer=optimizer,
            schedule=lambda step: jnp.float32(0.1),
            seed=0,
            mesh=mesh,
        ),
        out_shardings=(placements, None),
    )
    for index in range(count):
        batch = batch_of(index)
        if index == spoil:
            batch["x"][0, 0] = np.nan
        state, _ = step(state, {}, sharding.to_devices(batch, mesh))
    return first, state


def expected_statistics(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = np.zeros(WIDTH), np.ones(WIDTH)
    for x in batches:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(0)
        variance = MOMENTUM * variance + (1 - MOMENTUM) * x.var(0)
    return mean, variance


def assert_same(first, second, **tolerance):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_are_those_of_the_global_batch(devices, accumulate):
    """On any number of devices; micro-batches update them one after the other."""
    _, state = steps(devices=devices, accumulate=accumulate)
    batches = [batch_of(i)["x"][k::accumulate] for i in range(3) for k in range(accumulate)]
    mean, variance = expected_statistics(batches)
    np.testing.assert_allclose(state.variables["norm"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(state.variables["norm"]["var"], variance, rtol=1e-4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.variables))


def test_parameters_and_variables_do_not_depend_on_the_number_of_devices():
    _, alone = steps(devices=1)
    _, spread = steps(devices=8)
    assert_same(alone.params, spread.params, rtol=2e-4, atol=1e-5)
    assert_same(alone.variables, spread.variables, rtol=1e-5)


def test_the_optimizer_knows_nothing_of_variables():
    first, state = steps(count=1)
    moments = state.opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)
    assert set(state.params) == {"head", "norm"}
    assert set(state.variables["norm"]) == {"mean", "var"}
    assert not np.array_equal(first.variables["norm"]["mean"], state.variables["norm"]["mean"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_keeps_the_old_variables(accumulate):
    _, before = steps(count=2, accumulate=accumulate)
    _, after = steps(count=3, accumulate=accumulate, spoil=2)
    assert int(after.skipped) == 1
    assert_same(after.variables, before.variables, rtol=0)
    assert_same(after.params, before.params, rtol=0)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_codebook_follows_the_mean_of_what_chose_it(devices):
    first, state = steps(devices=devices, count=1, module=Codebook)
    head, codes = first.params["head"], np.array(first.variables["codes"])
    z = batch_of(0)["x"] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    chosen = np.square(z[:, None] - codes).sum(-1).argmin(1)
    for code in range(CODES):
        if (chosen == code).any():
            codes[code] = MOMENTUM * codes[code] + (1 - MOMENTUM) * z[chosen == code].mean(0)
    np.testing.assert_allclose(state.variables["codes"], codes, rtol=1e-5, atol=1e-6)
    assert len(set(chosen)) > 1


def test_a_loss_that_changes_the_layout_is_an_error_that_names_it():
    task = regression()

    def loss(params, variables, batch, key, step):
        loss_sum, sums, variables = task.loss(params, variables, batch, key, step)
        return loss_sum, sums, {"norm": {"mean": variables["norm"]["mean"][:2]}}

    optimizer = optim.adamw(OPTIMIZER)
    with pytest.raises(ValueError, match=r"norm/mean: float32\[4\] became float32\[2\]; norm/var:"):
        train_step(
            init_state(task, optimizer, jax.random.key(0)),
            {},
            batch_of(0),
            task=dataclasses.replace(task, loss=loss),
            config=OPTIMIZER,
            optimizer=optimizer,
            schedule=lambda step: 0.1,
            seed=0,
        )


def feed() -> loop.Feed:
    def training(start):
        step = start
        while True:
            yield batch_of(step)
            step += 1

    def evaluation():
        yield batch_of(99)

    return loop.Feed(training=training, evaluation=evaluation, metrics=dict)


def train(workdir: Path, *, optimizer: OptimizerConfig = OPTIMIZER, **changes) -> loop.Trained:
    return loop.train(
        loop.Job(task=regression(), feed=feed()),
        run=dataclasses.replace(RUN, **changes),
        optimizer_config=optimizer,
        config={},
        workdir=str(workdir),
    )


def test_a_run_saves_resumes_and_evaluates_with_its_statistics(tmp_path):
    straight = train(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "cut_off")
    shutil.rmtree(tmp_path / "cut_off" / "checkpoints" / "4")
    resumed = train(tmp_path / "cut_off")
    assert_same(resumed.state, straight.state, rtol=0)
    assert resumed.evaluation == straight.evaluation
    mean, variance = expected_statistics([batch_of(i)["x"] for i in range(4)])
    np.testing.assert_allclose(straight.state.variables["norm"]["mean"], mean, rtol=1e-5)

    batch, params = batch_of(99), sharding.to_host(straight.state.params)
    x = (batch["x"] - mean) / np.sqrt(variance + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    predicted = x @ params["head"]["kernel"] + params["head"]["bias"]
    expected = np.square(predicted[:, 0] - batch["y"]).mean()
    np.testing.assert_allclose(straight.evaluation["loss"], expected, rtol=1e-3)


@pytest.mark.slow
def test_the_average_is_evaluated_with_the_current_statistics(tmp_path):
    optimizer = dataclasses.replace(OPTIMIZER, ema_decay=0.5)
    trained = train(tmp_path, optimizer=optimizer)
    task = regression()
    sums = task.evaluate(trained.state.ema, trained.state.variables, {}, batch_of(99))
    expected = task.metrics(sums)["loss"]
    np.testing.assert_allclose(trained.evaluation["ema_loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_warm_start_takes_the_statistics_where_they_fit(tmp_path):
    trained = train(tmp_path / "first")
    warm = train(tmp_path / "warm", init_from=str(tmp_path / "first"), steps=1)
    mean = 0.9 * np.asarray(trained.state.variables["norm"]["mean"]) + 0.1 * batch_of(0)["x"].mean(
        0
    )
    np.testing.assert_allclose(warm.state.variables["norm"]["mean"], mean, rtol=1e-5)

    fresh = {"codes": jnp.ones((CODES, 2))}
    taken = checkpoint.restore_variables(
        str(tmp_path / "first"), shapes=jax.eval_shape(lambda: fresh), fresh=lambda: fresh
    )
    assert taken is fresh


def test_without_variables_a_checkpoint_has_no_such_entry(tmp_path):
    train(tmp_path / "with", steps=2)
    assert "norm" in checkpoint.saved_params_shapes(str(tmp_path / "with"), part="variables")

    plain = dataclasses.replace(
        regression(),
        init=lambda key: {"head": {"kernel": jax.random.normal(key, (WIDTH, 1))}},
        init_variables=None,
        loss=lambda params, batch, key, step: (
            (total := jnp.square(batch["x"] @ params["head"]["kernel"]).sum()),
            {"loss": total, "weight": batch["y"].size},
        ),
        evaluate=lambda params, frozen, batch: {"loss": jnp.float32(0), "weight": 1},
    )
    workdir = str(tmp_path / "plain")
    run = dataclasses.replace(RUN, steps=2)
    trained = loop.train(
        loop.Job(task=plain, feed=feed()),
        run=run,
        optimizer_config=OPTIMIZER,
        config={},
        workdir=workdir,
    )
    assert trained.state.variables == {}
    assert checkpoint.saved_params_shapes(workdir, part="variables") == {}
