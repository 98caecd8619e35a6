"""The train state and the train step: what happens to the parameters once a batch is on devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from beit_jax.config import OptimizerConfig
from beit_jax.training import optim, sharding

Batch = dict[str, jax.Array]
# Sums over a batch; `weight` divides the others. Sums add up over micro-batches, hosts and eval
# batches, means don't.
Sums = dict[str, jax.Array]

# Sets the randomness of `Task.prepare` apart from that of micro-batches, numbered from 0.
PREPARATION = 1 << 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done, skipped ones included; the schedule and all randomness
        follow it.
      params: nested dict, float32.
      ema: their moving average (`OptimizerConfig.ema_decay`); empty without one.
      opt_state: optax state.
      skipped: int32, non-finite updates skipped so far.
      skipped_in_row: int32, those since the last good one.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a job gives to the shared train loop.

    Attributes:
      init: `key -> params`.
      prepare: `(frozen, batch, key) -> batch`, what needs no gradient (normalise, tokenise, mix).
      loss: `(params, batch, key, step) -> (loss_sum, sums)`. `sums["weight"]` is what the loss
        sum and the other sums are divided by; it must not depend on the parameters.
      evaluate: `(params, frozen, batch) -> sums` on held-out images; `batch["valid"]` marks
        padding.
      metrics: sums → scalars by name; "loss" is among them.
      best: the metric on held-out images, the larger the better, whose best checkpoint is kept;
        "" keeps none.
      frozen: parameters that are not trained (the tokenizer's), passed to prepare and evaluate.
      flops_per_image: of a training step, matmuls, forward and backward, for MFU.
    """

    init: Callable[[jax.Array], Any]
    prepare: Callable[[Any, Batch, jax.Array], Batch]
    loss: Callable[[Any, Batch, jax.Array, jax.Array], tuple[jax.Array, Sums]]
    evaluate: Callable[[Any, Any, Batch], Sums]
    metrics: Callable[[Sums], dict[str, jax.Array]]
    frozen: Any
    flops_per_image: float
    best: str = ""


def init_state(
    task: Task, optimizer: optax.GradientTransformation, key: jax.Array, *, average: bool = False
) -> TrainState:
    """A fresh train state; runs under `jax.jit` and `jax.eval_shape`."""
    return state_from_params(task.init(key), optimizer=optimizer, average=average)


def state_from_params(
    params: Any, *, optimizer: optax.GradientTransformation, average: bool = False
) -> TrainState:
    """Step 0 with these parameters, a fresh optimizer and, where asked for, an average."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.copy, params) if average else {},
        opt_state=optimizer.init(params),
        skipped=zero,
        skipped_in_row=zero,
    )


def state_shapes(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, *, average: bool = False
) -> TrainState:
    """The train state's shapes, dtypes and shardings; nothing is materialised."""
    shapes = jax.eval_shape(
        lambda key: init_state(task, optimizer, key, average=average), jax.random.key(0)
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    task: Task,
    config: OptimizerConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[jax.Array], jax.Array],
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one global batch.

    The loss is the weighted mean over the global batch, whatever the number of devices and
    micro-batches: gradients of sums are added up and divided by the total weight once. An update
    whose loss or gradient norm is not finite is skipped and counted; `optimizer`, as `optim.adamw`
    makes it, then keeps its state itself.

    `mesh` is that of the state's shardings, needed where there are several devices: see
    `sharding.on_mesh` and `_with_whole_parameters`.

    Returns:
      The new state and scalar metrics: the task's, `grad_norm` (before the clip),
      `learning_rate`, `skipped` and `skipped_in_row`.
    """
    if mesh is not None:
        task = dataclasses.replace(task, loss=sharding.on_mesh(task.loss, mesh))
        if mesh.shape[sharding.FSDP] > 1:
            task = dataclasses.replace(task, loss=_with_whole_parameters(task.loss, mesh))
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = task.prepare(frozen, batch, jax.random.fold_in(key, PREPARATION))
    gradients, sums = _gradients(
        state.params, batch, key, state.step, task=task, micro_batches=config.accumulate
    )
    # The mean's norm, and later the mean clipped, without a pass over memory for the mean itself.
    norm = optax.tree.norm(gradients) / sums["weight"]
    metrics = task.metrics(sums)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    factor = optim.clip_factor(norm, limit=config.clip_norm) / sums["weight"]
    clipped = jax.tree.map(lambda g: g * factor, gradients)
    directions, opt_state = optimizer.update(clipped, state.opt_state, state.params, finite=finite)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, directions)
    ema = {}
    if config.ema_decay is not None:
        decay = config.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        ema=keep(ema, state.ema),
        opt_state=opt_state,
        skipped=state.skipped + skipped,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1).astype(jnp.int32),
    )
    metrics |= {
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": new_state.skipped,
        "skipped_in_row": new_state.skipped_in_row,
    }
    return new_state, metrics


def _with_whole_parameters(loss: Callable, mesh: Mesh) -> Callable:
    """`loss` with split parameters gathered first, and their gradients summed whole.

    Left to itself, the partitioner carries a kernel's split into the activations it makes, and
    then moves those between devices: many times the bytes of the parameters.
    """
    whole = NamedSharding(mesh, sharding.REPLICATED)

    def gathered(params: Any, *rest: Any) -> tuple[jax.Array, Sums]:
        return loss(jax.lax.with_sharding_constraint(params, whole), *rest)

    return gathered


def _gradients(
    params: Any,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    *,
    task: Task,
    micro_batches: int,
) -> tuple[Any, Sums]:
    """Gradients of the loss sum, and the sums, over all micro-batches."""
    differentiate = jax.grad(task.loss, has_aux=True)
    if micro_batches == 1:
        return differentiate(params, batch, key, step)

    # Every k-th image goes into the same micro-batch: no image leaves its device.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0
        ),
        batch,
    )

    def add(total, micro):
        index, part = micro
        result = differentiate(params, part, jax.random.fold_in(key, index), step)
        return jax.tree.map(jnp.add, total, result), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(differentiate, params, first, key, step)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(micro_batches), split))
    return total
