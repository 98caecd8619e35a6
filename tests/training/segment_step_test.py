"""Training steps of a segmenter against PyTorch: loss, gradients, running statistics, AdamW.

The peer is `transformers`' UperNet in training mode. It has no dropout of channels and counts
ignored pixels out of its loss, so dropout is off and its loss is computed here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax.config import (
    InferenceConfig,
    OptimizerConfig,
    RunConfig,
    SegmentDataConfig,
    SegmentHeadConfig,
)
from beit_jax.models.functional import flatten
from beit_jax.models.segmenter import segmenter
from beit_jax.tasks.segment import SegmentConfig, segment_task
from beit_jax.training import optim, sharding
from beit_jax.training.state import Task, init_state, state_from_params, state_shapes, train_step
from tests.models import upernet_peer
from tests.tiny import PER_BLOCK

torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")

MODEL = dataclasses.replace(
    PER_BLOCK, layers=4, width=16, heads=2, mlp_width=32, image_size=24, patch_size=4
)
HEAD = SegmentHeadConfig(
    blocks=(1, 2, 3, 4), channels=12, pool_scales=(1, 2), auxiliary_channels=8, dropout=0.0
)
CLASSES, BATCH, IGNORED = 5, 4, 255
# BatchNorm takes out what these add to every pixel, so that their gradients are rounding, which
# Adam scales up to steps; and the means that they move.
WITHOUT_GRADIENT = {"neck/up4/conv1/bias", "neck/up4/conv2/bias", "neck/up2/conv/bias"}
MOVED_BY_THEM = {f"{name}/norm/mean" for name in ("neck/up4", "head/lateral_0", "head/lateral_1")}


def batch_of(seed: int) -> dict[str, np.ndarray]:
    """Images, and maps of which a fifth is ignored."""
    rng, side = np.random.default_rng(seed), MODEL.image_size
    labels = rng.integers(0, CLASSES, (BATCH, side, side))
    labels[rng.random(labels.shape) < 0.2] = IGNORED
    images = rng.normal(size=(BATCH, side, side, 3)).astype(np.float32)
    return {"image": images, "segmentation": labels.astype(np.uint8)}


def loss_task(model) -> Task:
    """The job's own task, given images that are normalised already."""
    config = SegmentConfig(
        run=RunConfig(steps=12, batch_size=BATCH),
        model=MODEL,
        head=HEAD,
        data=SegmentDataConfig(source="embedded", image_size=MODEL.image_size),
        inference=InferenceConfig(stride=16),
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=0),
        classes=CLASSES,
        labels=tuple(map(str, range(CLASSES))),
    )
    task = segment_task(model, config=config)
    return dataclasses.replace(task, prepare=lambda frozen, batch, key: batch)


def peer_loss(peer, batch):
    labels = torch.from_numpy(batch["segmentation"].astype(np.int64))
    total = 0.0
    outputs = upernet_peer.head_outputs(peer, batch["image"])
    for logits, weight in zip(outputs, (1.0, 0.4), strict=True):
        logits = torch.nn.functional.interpolate(
            logits, size=labels.shape[1:], mode="bilinear", align_corners=False
        )
        errors = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="none"
        )
        total = total + weight * errors.mean()  # ignored pixels' are zeros
    return total


def start_together():
    """The peer in training mode, our model, and the peer's weights as its state's trees."""
    peer = upernet_peer.upernet(MODEL, head=HEAD, classes=CLASSES).train()
    model = segmenter(MODEL, head=HEAD, classes=CLASSES)
    return peer, model, *trees(peer)


def trees(peer):
    """Parameters and variables, copied: PyTorch goes on to write into its own buffers."""
    both = upernet_peer.to_segmenter(peer.state_dict(), head=HEAD, layers=MODEL.layers)
    return jax.tree.map(np.array, both)


def gradient_recorder() -> optax.GradientTransformationExtraArgs:
    """An optimizer that moves nothing; its state is the last gradient."""

    def update(updates, state, params=None, **extra):
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )


@pytest.mark.slow
def test_a_step_has_pytorchs_loss_gradients_and_running_statistics():
    peer, model, params, variables = start_together()
    batch = batch_of(0)
    expected = peer_loss(peer, batch)
    expected.backward()

    recorder = gradient_recorder()
    step = functools.partial(
        train_step,
        task=loss_task(model),
        config=OptimizerConfig(learning_rate=1.0, warmup_steps=0),
        optimizer=recorder,
        schedule=lambda step: jnp.float32(1.0),
        seed=0,
    )
    state = state_from_params(params, variables=variables, optimizer=recorder)
    state, metrics = jax.jit(step)(state, {}, batch)

    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-5)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in peer.named_parameters()
    }
    wanted, _ = upernet_peer.to_segmenter(gradients, head=HEAD, layers=MODEL.layers)
    wanted, found = flatten(wanted), flatten(state.opt_state)
    assert wanted.keys() == found.keys()
    largest = max(np.abs(value).max() for value in wanted.values())
    for name, value in wanted.items():
        scale = largest if name in WITHOUT_GRADIENT else np.abs(value).max()
        assert scale > 0, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * scale, err_msg=name)
    _, statistics = trees(peer)
    statistics, found = flatten(statistics), flatten(state.variables)
    assert statistics.keys() == found.keys()
    for name, value in statistics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert found["head/fusion/norm/count"] == 8  # the peer had seen seven


@pytest.mark.slow
def test_a_step_is_the_same_on_eight_devices_with_split_parameters():
    """Statistics, loss and gradients are the global batch's; kernels are split over two devices."""
    head = dataclasses.replace(HEAD, kind="linear", blocks=(2, 3, 4), channels=0)
    task, recorder = loss_task(segmenter(MODEL, head=head, classes=CLASSES)), gradient_recorder()
    pair = batch_of(0), batch_of(1)
    batch = {name: np.concatenate([part[name] for part in pair]) for name in pair[0]}
    results = []
    for devices, fsdp in ((1, 1), (8, 2)):
        mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
        shapes = state_shapes(task, recorder, mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        fresh = functools.partial(init_state, task, recorder)
        state = jax.jit(fresh, out_shardings=placements)(jax.random.key(0))
        step = functools.partial(
            train_step,
            task=task,
            config=OptimizerConfig(learning_rate=1.0, warmup_steps=0),
            optimizer=recorder,
            schedule=lambda step: jnp.float32(1.0),
            seed=0,
            mesh=mesh,
        )
        step = jax.jit(step, out_shardings=(placements, None))
        state, metrics = step(state, {}, sharding.to_devices(batch, mesh))
        results.append((metrics["loss"], state.opt_state, state.variables))
    kernel = results[1][1]["auxiliary"]["conv_0"]["conv"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    for alone, spread in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(alone).max()
        np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-4 * scale + 1e-9)


def peer_groups(peer, *, decay: float, weight_decay: float) -> list[dict]:
    """AdamW's groups as the official constructor makes them: rate^(L + 1 - id), 1-D undecayed."""
    groups = []
    for name, parameter in peer.named_parameters():
        parts = name.split(".")
        depth = MODEL.layers + 1
        if "embeddings" in parts:
            depth = 0
        elif "layers" in parts:
            depth = int(parts[parts.index("layers") + 1]) + 1
        free = parameter.ndim == 1 or name.endswith(".bias")
        groups.append(
            {
                "params": [parameter],
                "weight_decay": 0.0 if free else weight_decay,
                "scale": decay ** (MODEL.layers + 1 - depth),
            }
        )
    return groups


@pytest.mark.slow
def test_twelve_steps_of_adamw_with_layer_decay_and_poly_are_pytorchs():
    """Weight decay and rates are large, so that a parameter in a wrong group would be far off."""
    steps, decay, base = 12, 0.65, 3e-3
    config = OptimizerConfig(
        learning_rate=base,
        min_learning_rate=0.0,
        warmup_steps=4,
        weight_decay=0.3,
        layer_decay=decay,
        schedule="poly",
        decay_class_token=True,
    )
    peer, model, params, variables = start_together()
    start, optimizer = flatten(params), optim.adamw(config)
    step = jax.jit(
        functools.partial(
            train_step,
            task=loss_task(model),
            config=config,
            optimizer=optimizer,
            schedule=optim.learning_rate(config, steps=steps),
            seed=0,
        )
    )
    state = state_from_params(params, variables=variables, optimizer=optimizer)
    adamw = torch.optim.AdamW(peer_groups(peer, decay=decay, weight_decay=0.3))
    for index in range(steps):
        batch = batch_of(index)
        rate = base * (1 - index / steps)
        if index < 4:
            rate *= 1 - (1 - index / 4) * (1 - 1e-6)
        for group in adamw.param_groups:
            group["lr"] = rate * group["scale"]
        loss = peer_loss(peer, batch)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        state, metrics = step(state, {}, batch)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)

    end, statistics = (flatten(tree) for tree in trees(peer))
    for name, value in flatten(state.params).items():
        if name in WITHOUT_GRADIENT:
            continue
        distance = np.linalg.norm(end[name] - start[name])
        assert distance > 0, name
        assert np.linalg.norm(value - end[name]) < 1e-2 * distance, name
    for name, value in flatten(state.variables).items():
        if name not in MOVED_BY_THEM:
            np.testing.assert_allclose(value, statistics[name], rtol=1e-3, atol=1e-3, err_msg=name)
