"""Schedule, decay list and AdamW, against the official formulas and against PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax.config import ConfigError, OptimizerConfig
from beit_jax.models.functional import flatten
from beit_jax.models.heads import masked_image_model
from beit_jax.training import optim
from beit_jax.training.state import Task, TrainState, init_state, train_step
from tests.tiny import TINY

CONFIG = OptimizerConfig(learning_rate=1.5e-3, warmup_steps=6250)
MODEL = dataclasses.replace(TINY, layers=2, width=16, heads=2, mlp_width=32, image_size=16)


def official_schedule(*, base, final, steps, warmup):
    """utils.py:383-400: two arrays, one after the other."""
    rising = np.linspace(0, base, warmup)
    i = np.arange(steps - warmup)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([rising, falling])


def test_schedule_is_the_official_array():
    steps = 300 * 625
    actual = np.asarray(optim.learning_rate(CONFIG, steps=steps)(jnp.arange(steps)))
    reference = official_schedule(base=1.5e-3, final=1e-5, steps=steps, warmup=6250)
    np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-9)
    assert actual[0] == 0
    assert actual[6249] == np.float32(1.5e-3)
    assert actual[6250] == np.float32(1.5e-3)
    # The authors' log of the last epoch averages these 625 (unilm issue 383).
    np.testing.assert_allclose(reference[-625:].mean(), 1.0014606556134688e-05, rtol=1e-6)
    np.testing.assert_allclose(actual[-625:].mean(), 1.0014606556134688e-05, rtol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_poly_schedule_is_mmcvs_iteration_by_iteration(accumulate):
    """Two hooks' arithmetic: the line first, then the warm-up's factor; an update has the rate of
    the last iteration it sums up."""
    steps, warmup, base, low = 60, 12, 3e-5, 1e-6
    config = OptimizerConfig(
        learning_rate=base,
        min_learning_rate=low,
        warmup_steps=warmup,
        schedule="poly",
        accumulate=accumulate,
    )
    reference = []
    for iteration in range(steps * accumulate):
        rate = (base - low) * (1 - iteration / (steps * accumulate)) ** 1.0 + low
        if iteration < warmup * accumulate:
            rate *= 1 - (1 - iteration / (warmup * accumulate)) * (1 - 1e-6)
        if (iteration + 1) % accumulate == 0:
            reference.append(rate)
    actual = np.asarray(optim.learning_rate(config, steps=steps)(jnp.arange(steps)))
    np.testing.assert_allclose(actual, reference, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hold_steps": 7}, 'hold_steps: 7, but the "poly" schedule changes with every step'),
        ({"min_learning_rate": 1.0}, "min_learning_rate: 1.0 is more than learning_rate, 0.0015"),
    ],
)
def test_what_the_poly_schedule_cannot_do_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, schedule="poly", **change)


@pytest.mark.parametrize("warmup", [0, 1])
def test_schedule_without_warm_up_starts_at_the_peak_or_zero(warmup):
    config = dataclasses.replace(CONFIG, warmup_steps=warmup)
    schedule = optim.learning_rate(config, steps=10)
    assert float(schedule(0)) == (np.float32(1.5e-3) if warmup == 0 else 0)
    assert np.isfinite(np.asarray(schedule(jnp.arange(10)))).all()


def test_decay_list_by_name():
    """Golden: everything 1-D, biases, cls_token and pos_embed are free of decay, nothing else."""
    plain = dataclasses.replace(MODEL, positions="absolute")
    shapes = masked_image_model(MODEL, vocabulary=8).shapes()
    plain_shapes = masked_image_model(plain, vocabulary=8).shapes()
    decayed = flatten(optim.decay_mask(shapes)) | flatten(optim.decay_mask(plain_shapes))
    assert {name for name, value in decayed.items() if value} == {
        "encoder/blocks/attention/key/kernel",
        "encoder/blocks/attention/proj/kernel",
        "encoder/blocks/attention/query/kernel",
        "encoder/blocks/attention/value/kernel",
        "encoder/blocks/mlp/fc1/kernel",
        "encoder/blocks/mlp/fc2/kernel",
        "encoder/mask_token",
        "encoder/patch_embed/kernel",
        "encoder/relative_position_bias/table",
        "lm_head/kernel",
    }
    assert {name for name, value in decayed.items() if not value} == {
        "encoder/blocks/attention/proj/bias",
        "encoder/blocks/attention/query/bias",
        "encoder/blocks/attention/value/bias",
        "encoder/blocks/gamma_1",
        "encoder/blocks/gamma_2",
        "encoder/blocks/mlp/fc1/bias",
        "encoder/blocks/mlp/fc2/bias",
        "encoder/blocks/norm1/bias",
        "encoder/blocks/norm1/scale",
        "encoder/blocks/norm2/bias",
        "encoder/blocks/norm2/scale",
        "encoder/cls_token",
        "encoder/norm/bias",
        "encoder/norm/scale",
        "encoder/patch_embed/bias",
        "encoder/pos_embed",
        "lm_head/bias",
    }


def test_the_class_token_and_positions_can_be_decayed():
    """As the official segmentation code does, and nothing else with them."""
    plain = dataclasses.replace(MODEL, positions="absolute")
    shapes = masked_image_model(plain, vocabulary=8).shapes()
    usual = flatten(optim.decay_mask(shapes))
    found = flatten(optim.decay_mask(shapes, class_token=True))
    changed = {name for name in usual if usual[name] != found[name]}
    assert changed == {"encoder/cls_token", "encoder/pos_embed"}
    ones = {"encoder": {"cls_token": np.ones((1, 1, 2), np.float32)}}
    for decayed in (False, True):
        optimizer = optim.adamw(dataclasses.replace(CONFIG, decay_class_token=decayed))
        zeros = jax.tree.map(np.zeros_like, ones)
        updates, _ = optimizer.update(zeros, optimizer.init(ones), ones)
        assert (updates["encoder"]["cls_token"] == np.float32(0.05 * decayed)).all()


def test_probe_heads_are_decayed_whole():
    """The linear probe's optimizer has one group: its biases are decayed, no one else's are."""
    shapes = {"probe": {"kernel": jnp.zeros((3, 4, 2)), "bias": jnp.zeros((3, 2))}}
    assert flatten(optim.decay_mask(shapes)) == {"probe/kernel": True, "probe/bias": True}
    shapes["head"] = {"bias": jnp.zeros(2)}
    assert not optim.decay_mask(shapes)["head"]["bias"]


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["relative_shared", "relative_per_block"])
def test_tables_can_be_taken_out_of_decay(positions):
    """Only the tables' flag changes, and a step with a zero gradient leaves them where they are."""
    config = dataclasses.replace(MODEL, positions=positions)
    shapes = masked_image_model(config, vocabulary=8).shapes()
    with_tables = flatten(optim.decay_mask(shapes))
    without = flatten(optim.decay_mask(shapes, relative_positions=False))
    changed = {name for name in with_tables if with_tables[name] != without[name]}
    prefix = "blocks/attention/" if positions == "relative_per_block" else ""
    assert changed == {f"encoder/{prefix}relative_position_bias/table"}

    params = jax.tree.map(lambda shape: np.ones(shape.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    optimizer = optim.adamw(dataclasses.replace(CONFIG, decay_relative_positions=False))
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for name, update in flatten(updates).items():
        assert (np.asarray(update) == np.float32(0.05 * without[name])).all(), name


@pytest.mark.slow
def test_a_held_rate_is_pytorchs_cosine_per_epoch():
    """The linear probe's: no warm-up, to zero, stepped once in seven steps."""
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    epochs, hold = 10, 7
    config = OptimizerConfig(
        learning_rate=4e-3, min_learning_rate=0.0, warmup_steps=0, hold_steps=hold
    )
    actual = np.asarray(optim.learning_rate(config, steps=epochs * hold)(jnp.arange(epochs * hold)))
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=4e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0.0)
    reference = []
    for _ in range(epochs):
        reference += hold * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(actual, reference, rtol=1e-5)
    assert len(np.unique(actual)) == epochs


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no weight-decay rule .*: blocks/novelty, other"):
        optim.decay_mask({"blocks": {"novelty": jnp.zeros(2)}, "other": jnp.zeros(2)})


def test_clip_is_torchs():
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    rng = np.random.default_rng(0)
    values = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), (5,))]
    for limit in (0.5, 100.0, None):
        parameters = [torch.zeros(v.shape, requires_grad=True) for v in values]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = torch.from_numpy(value.copy())
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit or 1e9)
        factor = optim.clip_factor(jnp.float32(norm.item()), limit=limit)
        for value, parameter in zip(values, parameters, strict=True):
            np.testing.assert_allclose(value * factor, parameter.grad.numpy(), rtol=1e-6)


def test_adam_is_optaxs():
    """Moments and directions over some steps; an update that is not finite leaves the state."""
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    actual = optim.adamw(config)
    reference = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.ones(5, np.float32)}
    state, expected_state = actual.init(params), reference.init(params)
    update = jax.jit(actual.update)
    for _ in range(3):
        gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        directions, state = update(gradients, state, params, finite=True)
        expected, expected_state = reference.update(gradients, expected_state)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-6),
            (directions, state[0]),
            (expected, expected_state),
        )
    bad = jax.tree.map(lambda x: x * np.nan, params)
    _, after = update(bad, state, params, finite=False)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def masked_task(model):
    """Masked cross-entropy with labels from outside: the pre-training loss without a tokenizer."""

    def loss(params, batch, key, step):
        logits = model.apply(
            params, batch["image"], mask=batch["mask"], positions=batch["positions"]
        )
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)
        total = (nll[..., 0] * batch["weights"]).sum()
        return total, {"loss": total, "weight": batch["weights"].sum()}

    return Task(
        init=model.init,
        prepare=lambda frozen, batch, key: batch,
        loss=loss,
        evaluate=lambda params, frozen, batch: loss(params, batch, None, None)[1],
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={},
        flops_per_image=0.0,
    )


def batches(count, *, size=8, vocabulary=24, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        weights = np.ones((size, 3), np.float32)
        weights[::3, 2] = 0  # ragged
        positions = np.stack([rng.permutation(4)[:3] for _ in range(size)]).astype(np.int32)
        mask = np.zeros((size, 4), bool)
        for row in range(size):
            mask[row, positions[row][weights[row] > 0]] = True
        yield {
            "image": rng.normal(size=(size, 16, 16, 3)).astype(np.float32),
            "mask": mask,
            "positions": positions,
            "labels": rng.integers(0, vocabulary, (size, 3)),
            "weights": weights,
        }


def jitted_step(task, config, *, steps):
    optimizer = optim.adamw(config)
    schedule = optim.learning_rate(config, steps=steps)

    def step(state: TrainState, batch):
        return train_step(
            state,
            {},
            batch,
            task=task,
            config=config,
            optimizer=optimizer,
            schedule=schedule,
            seed=0,
        )

    return optimizer, jax.jit(step)


@pytest.mark.slow
def test_twelve_steps_equal_torch_adamw():
    """Same weights, groups, schedule and clip: losses within 1e-4, parameters within 1e-3."""
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    steps, vocabulary = 12, 24
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=4, clip_norm=0.5)
    peer = beit_peer.masked_image_model(MODEL, vocabulary=vocabulary)
    model = masked_image_model(MODEL, vocabulary=vocabulary)
    optimizer, step = jitted_step(masked_task(model), config, steps=steps)
    state = init_state(masked_task(model), optimizer, jax.random.key(0))
    start = beit_peer.to_native(dict(peer.named_parameters()), layers=MODEL.layers)
    # Copied: torch goes on to write into its own buffers.
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: jnp.array(x), start))

    no_decay = [
        name
        for name, parameter in peer.named_parameters()
        if parameter.ndim == 1 or name.endswith(".bias") or "cls_token" in name
    ]
    parameters = dict(peer.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in no_decay], "weight_decay": 0.0},
            {
                "params": [p for n, p in parameters.items() if n not in no_decay],
                "weight_decay": 0.05,
            },
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    rates = official_schedule(base=2e-3, final=1e-5, steps=steps, warmup=4)
    clipped = 0
    for rate, batch in zip(rates, batches(steps, vocabulary=vocabulary), strict=True):
        for group in adamw.param_groups:
            group["lr"] = rate
        logits = peer(
            torch.from_numpy(batch["image"].transpose(0, 3, 1, 2)),
            bool_masked_pos=torch.from_numpy(batch["mask"]),
        ).logits
        rows = np.repeat(np.arange(8), 3).reshape(8, 3)
        hidden = batch["weights"] > 0
        loss = torch.nn.functional.cross_entropy(
            logits[rows[hidden], batch["positions"][hidden]],
            torch.from_numpy(batch["labels"][hidden]),
        )
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        clipped += norm.item() > 0.5
        adamw.step()
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-3)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)
    assert clipped > 3, "the clip was part of what was compared"
    end = flatten(beit_peer.to_native(dict(peer.named_parameters()), layers=MODEL.layers))
    for name, value in flatten(state.params).items():
        difference = np.abs(np.asarray(value) - end[name]).max() / np.abs(end[name]).max()
        assert difference < 1e-3, name


@pytest.mark.slow
def test_micro_batches_give_the_same_step():
    """The mean is over the whole batch, though the micro-batches' weights differ."""
    model = masked_image_model(MODEL, vocabulary=24)
    task = masked_task(model)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    optimizer, step = jitted_step(task, config, steps=10)
    _, accumulated = jitted_step(task, dataclasses.replace(config, accumulate=4), steps=10)
    state = init_state(task, optimizer, jax.random.key(0))
    (batch,) = batches(1)
    one, metrics = step(state, batch)
    four, metrics_four = accumulated(state, batch)
    np.testing.assert_allclose(metrics["loss"], metrics_four["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], metrics_four["grad_norm"], rtol=1e-4)
    mu_one, mu_four = (flatten(s.opt_state[0].mu) for s in (one, four))
    for name in mu_one:
        np.testing.assert_allclose(mu_one[name], mu_four[name], rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_non_finite_update_is_skipped_and_counted():
    model = masked_image_model(MODEL, vocabulary=24)
    task = masked_task(model)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    optimizer, step = jitted_step(task, config, steps=10)
    state = init_state(task, optimizer, jax.random.key(0))
    good, bad = batches(2)
    bad["image"][0, 0, 0, 0] = np.nan
    state, _ = step(state, good)
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    for old, new in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    after, _ = step(after, bad)
    assert int(after.skipped_in_row) == 2
    after, _ = step(after, good)
    assert (int(after.skipped), int(after.skipped_in_row)) == (2, 0)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
    )


@pytest.mark.slow
def test_it_overfits_one_batch():
    """A tiny model names every masked token of eight images it sees again and again."""
    model = masked_image_model(dataclasses.replace(MODEL, width=32), vocabulary=24)
    task = masked_task(model)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    optimizer, step = jitted_step(task, config, steps=150)
    state = init_state(task, optimizer, jax.random.key(0))
    (batch,) = batches(1)
    _, first = step(state, batch)
    np.testing.assert_allclose(first["loss"], np.log(24), rtol=0.02)  # chance at the start
    for _ in range(150):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.05


def test_a_frozen_encoder_moves_neither_by_gradients_nor_by_decay():
    """Its moments go on, so that the setting may be changed when a run continues."""
    params = {
        "encoder": {"blocks": {"mlp": {"fc1": {"kernel": jnp.ones((2, 3, 3))}}}},
        "head": {"kernel": jnp.ones((3, 2))},
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    found = {}
    for frozen in (False, True):
        config = dataclasses.replace(CONFIG, freeze_encoder=frozen, layer_decay=0.5)
        optimizer = optim.adamw(config)
        state = optimizer.init(params)
        directions, state = optimizer.update(gradients, state, params, finite=True)
        found[frozen] = flatten(directions), jax.tree.structure(state)
    (moving, there), (still, here) = found[False], found[True]
    assert there == here
    encoder = "encoder/blocks/mlp/fc1/kernel"
    assert np.all(moving[encoder] > 0)
    assert not np.any(still[encoder])
    np.testing.assert_array_equal(still["head/kernel"], moving["head/kernel"])
