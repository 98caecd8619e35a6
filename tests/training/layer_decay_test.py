"""Layer-wise learning rates: every parameter's multiplier and decay flag, and PyTorch's AdamW.

`golden/` holds what a reviewer reads: one line for each parameter of the official fine-tuning
models. After a wanted change: BEIT_JAX_WRITE_GOLDEN=1 pytest tests/training/layer_decay_test.py
"""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ModelConfig, OptimizerConfig
from beit_jax.models.functional import flatten
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.training import batch_augment, optim
from beit_jax.training.state import Task, TrainState, state_from_params, train_step
from tests.tiny import PER_BLOCK

GOLDEN = pathlib.Path(__file__).parent / "golden"
BASE = ModelConfig.base(positions="relative_per_block")
LARGE = ModelConfig.large(positions="relative_per_block")
OFFICIAL = {"beit_base": (BASE, 0.65), "beit_large": (LARGE, 0.75)}
MODEL = dataclasses.replace(PER_BLOCK, width=16, heads=2, mlp_width=32, image_size=16)


def multipliers(shapes, *, decay, layers):
    """Flat: a list with a number for each block, or one number."""
    tree = optim.layer_multipliers(shapes, decay=decay, layers=layers)
    shapes, result = flatten(shapes), {}
    for name, value in flatten(tree).items():
        assert value.dtype == np.float32
        assert np.broadcast_shapes(value.shape, shapes[name].shape) == shapes[name].shape, name
        if name.startswith("encoder/blocks/"):
            assert value.shape == (layers, *[1] * (len(shapes[name].shape) - 1)), name
            result[name] = value.ravel().tolist()
        else:
            assert value.shape == (), name
            result[name] = [float(value)]
    return result


def table(config, *, decay):
    """One line for each parameter: its path, whether it is decayed, its rate's multipliers."""
    shapes = classifier(config, classes=1000).shapes()
    decayed = flatten(optim.decay_mask(shapes))
    rows = [
        f"{name:<58} {'decay' if decayed[name] else '-':<5} "
        + " ".join(f"{value:.3e}" for value in values)
        for name, values in multipliers(shapes, decay=decay, layers=config.layers).items()
    ]
    return (
        "\n".join([f"{'parameter':<58} {'decay':<5} multiplier, block after block", *rows]) + "\n"
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_parameters_multiplier_and_decay_flag(name):
    config, decay = OFFICIAL[name]
    found = table(config, decay=decay)
    golden = GOLDEN / f"{name}_fine_tuning.txt"
    if os.environ.get("BEIT_JAX_WRITE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("name", OFFICIAL)
def test_multipliers_are_the_formulas(name):
    """decay^(L + 1 - id): id 0 embeddings, i + 1 for block i, L + 1 for the head."""
    config, decay = OFFICIAL[name]
    found = multipliers(
        classifier(config, classes=1000).shapes(), decay=decay, layers=config.layers
    )
    ids = {
        "encoder/cls_token": [0],
        "encoder/patch_embed/kernel": [0],
        "encoder/patch_embed/bias": [0],
        "fc_norm/scale": [config.layers + 1],
        "fc_norm/bias": [config.layers + 1],
        "head/kernel": [config.layers + 1],
        "head/bias": [config.layers + 1],
    }
    blocks = [name for name in found if name.startswith("encoder/blocks/")]
    # Per block: 3 kernels with a bias and one without, a table, 2 of each norm, 2 gammas, 4 of
    # the MLP.
    assert len(blocks) == 7 + 1 + 4 + 2 + 4
    ids |= {name: list(range(1, config.layers + 1)) for name in blocks}
    assert found.keys() == ids.keys()
    for name, values in found.items():
        expected = [decay ** (config.layers + 1 - layer) for layer in ids[name]]
        np.testing.assert_allclose(values, expected, rtol=1e-6, err_msg=name)


def test_the_published_ends():
    """Base at 0.65: first block 5.69e-3, embeddings 3.70e-3; large at 0.75: 1.00e-3, 7.5e-4."""
    for (config, decay), (block, embeddings) in zip(
        OFFICIAL.values(), ((5.69e-3, 3.70e-3), (1.00e-3, 7.5e-4)), strict=True
    ):
        shapes = classifier(config, classes=1000).shapes()
        found = multipliers(shapes, decay=decay, layers=config.layers)
        values = found["encoder/blocks/attention/relative_position_bias/table"]
        np.testing.assert_allclose(values[0], block, rtol=4e-3)
        np.testing.assert_allclose(values[-1], decay, rtol=1e-6)
        np.testing.assert_allclose(found["encoder/cls_token"], embeddings, rtol=4e-3)
        assert found["head/kernel"] == [1.0]


def test_a_shared_table_and_the_final_norm_go_with_the_head_and_tokens_with_the_embeddings():
    shared = dataclasses.replace(MODEL, positions="relative_shared")
    plain = dataclasses.replace(MODEL, positions="absolute")
    found = multipliers(masked_image_model(shared, vocabulary=8).shapes(), decay=0.5, layers=3)
    for name in ("relative_position_bias/table", "norm/scale", "norm/bias"):
        assert found[f"encoder/{name}"] == [1.0], name
    assert found["lm_head/kernel"] == found["lm_head/bias"] == [1.0]
    assert found["encoder/mask_token"] == [0.5**4]
    found = multipliers(classifier(plain, classes=5, pooling="cls").shapes(), decay=0.5, layers=3)
    assert found["encoder/pos_embed"] == [0.5**4]
    assert found["encoder/norm/scale"] == [1.0]
    assert found["encoder/blocks/norm1/scale"] == [0.5**3, 0.5**2, 0.5]


def test_wrong_trees_are_named():
    shapes = classifier(MODEL, classes=5).shapes()
    with pytest.raises(
        ValueError, match=r"no layer-decay rule .*: encoder/novelty, upsample/kernel"
    ):
        optim.layer_multipliers(
            {"encoder": {"novelty": jnp.zeros(2)}, "upsample": {"kernel": jnp.zeros(2)}},
            decay=0.5,
            layers=3,
        )
    with pytest.raises(ValueError, match=r"not 4 blocks .*: encoder/blocks/attention/key/kernel"):
        optim.layer_multipliers(shapes, decay=0.5, layers=4)
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, layer_decay=0.5)
    with pytest.raises(ValueError, match=r"no layer-decay rule .*: codebook"):
        optim.adamw(config).init({"codebook": jnp.zeros((2, 2))})


def test_a_tree_without_layers_needs_no_rule_where_nothing_is_scaled():
    params = {"codebook": jnp.ones((2, 2)), "encoder": {"in": {"kernel": jnp.ones((1, 1, 2, 2))}}}
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1.0, warmup_steps=0))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["codebook"], 1.05, rtol=1e-5)


@pytest.mark.slow
def test_direction_and_decay_are_both_scaled():
    """The first update is sign(g) + wd · p, times the multiplier: a ratio to the unscaled one."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.uniform(1, 2, shape.shape).astype(np.float32),
        classifier(MODEL, classes=5).shapes(),
    )
    gradients = jax.tree.map(lambda p: 0.1 * p, params)
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    updates = []
    for decay in (1.0, 0.65):
        optimizer = optim.adamw(dataclasses.replace(config, layer_decay=decay))
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    unscaled, scaled = (flatten(jax.tree.map(np.asarray, update)) for update in updates)
    expected = flatten(optim.layer_multipliers(params, decay=0.65, layers=3))
    for name, value in scaled.items():
        multiplier = np.broadcast_to(expected[name], value.shape)
        np.testing.assert_allclose(value / unscaled[name], multiplier, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        unscaled["head/kernel"], 1 + 0.5 * params["head"]["kernel"], rtol=1e-4
    )


def peer_groups(peer, *, layers, decay, weight_decay):
    """torch.optim groups as the official optim_factory.py makes them: by layer and by decay."""
    groups = {}
    for name, parameter in peer.named_parameters():
        if name.startswith("beit.embeddings."):
            layer = 0
        elif name.startswith("beit.layers."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = layers + 1
        free = parameter.ndim == 1 or name.endswith(".bias") or "cls_token" in name
        group = groups.setdefault(
            (layer, free),
            {
                "params": [],
                "weight_decay": 0.0 if free else weight_decay,
                "scale": decay ** (layers + 1 - layer),
            },
        )
        group["params"].append(parameter)
    assert len(groups) == 2 * (layers + 2)
    return list(groups.values())


def labelled_task(model):
    """Fine-tuning's loss: smoothed cross-entropy, summed over the batch."""

    def loss(params, batch, key, step):
        logits = model.apply(params, batch["image"])
        losses = batch_augment.smoothed_cross_entropy(logits, batch["label"], smoothing=0.1)
        return losses.sum(), {"loss": losses.sum(), "weight": jnp.float32(losses.size)}

    return Task(
        init=model.init,
        prepare=lambda frozen, batch, key: batch,
        loss=loss,
        evaluate=lambda params, frozen, batch: loss(params, batch, None, None)[1],
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={},
        flops_per_image=0.0,
    )


@pytest.mark.slow
def test_twelve_steps_equal_torch_adamw_with_the_same_groups():
    """Layer decay 0.65, warm-up, cosine, smoothed labels: losses and parameters, relative 1e-4.

    Weight decay and rates are large, so that a parameter in a wrong group differs by more
    than the bound on its distance travelled.
    """
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    steps, classes, decay = 12, 10, 0.65
    config = OptimizerConfig(
        learning_rate=5e-3,
        min_learning_rate=1e-6,
        warmup_steps=4,
        weight_decay=0.3,
        layer_decay=decay,
    )
    peer = beit_peer.classifier(MODEL, classes=classes, pooling="mean")
    model = classifier(MODEL, classes=classes)
    optimizer, task = optim.adamw(config), labelled_task(model)
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

    step = jax.jit(step)
    # Copied: torch goes on to write into its own buffers.
    start = jax.tree.map(
        np.array, beit_peer.classifier_to_native(dict(peer.named_parameters()), layers=MODEL.layers)
    )
    state = state_from_params(jax.tree.map(jnp.asarray, start), optimizer=optimizer)
    groups = peer_groups(peer, layers=MODEL.layers, decay=decay, weight_decay=0.3)
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(steps - 4) / (steps - 4)))
    rates = np.concatenate([np.linspace(0, 5e-3, 4), 1e-6 + (5e-3 - 1e-6) * cosine])
    rng = np.random.default_rng(0)
    for rate in rates:
        batch = {
            "image": rng.normal(size=(8, 16, 16, 3)).astype(np.float32),
            "label": rng.integers(0, classes, 8),
        }
        for group in adamw.param_groups:
            group["lr"] = rate * group["scale"]
        logits = peer(torch.from_numpy(batch["image"].transpose(0, 3, 1, 2))).logits
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(batch["label"]), label_smoothing=0.1
        )
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)

    start = flatten(start)
    end = flatten(
        beit_peer.classifier_to_native(dict(peer.named_parameters()), layers=MODEL.layers)
    )
    for name, value in flatten(state.params).items():
        distance = np.abs(end[name] - start[name]).max()
        difference = np.abs(np.asarray(value) - end[name]).max()
        assert distance > 0, name
        assert difference < 1e-4 * np.abs(end[name]).max(), name
        assert difference < 1e-3 * distance, name
