"""The train state and the train step, from a batch on devices to updated parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from beit_jax.config import OptimizerConfig
from beit_jax.training import optim, sharding
from beit_jax.types import Batch as Batch
from beit_jax.types import Params, PyTree, Variables
from beit_jax.types import Sums as Sums

# `(params, batch, key, step) -> (loss_sum, sums)` and `(params, frozen, batch) -> sums`.
StatelessLoss: TypeAlias = Callable[[Params, Batch, jax.Array, jax.Array], tuple[jax.Array, Sums]]
StatelessEvaluate: TypeAlias = Callable[[Params, PyTree, Batch], Sums]
# `(params, variables, batch, key, step) -> (loss_sum, sums, new_variables)`.
StatefulLoss: TypeAlias = Callable[
    [Params, Variables, Batch, jax.Array, jax.Array], tuple[jax.Array, Sums, Variables]
]
# `(params, variables, frozen, batch) -> sums`.
StatefulEvaluate: TypeAlias = Callable[[Params, Variables, PyTree, Batch], Sums]

# Separates the randomness of `Task.prepare` from that of micro-batches, which count from 0.
PREPARATION = 1 << 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done, skipped ones included; the schedule and all randomness
        follow it.
      params: nested dict, float32.
      variables: nested dict, the model's state that no gradient trains (running statistics, a
        codebook that follows a moving average); {} where it has none. Neither decayed nor averaged,
        unknown to the optimizer and replicated on every device.
      ema: the parameters' moving average (`OptimizerConfig.ema_decay`); empty without one.
      opt_state: optax state.
      skipped: int32, non-finite updates skipped so far.
      skipped_in_row: int32, those since the last good one.
    """

    step: jax.Array
    params: Params
    variables: Variables
    ema: Params
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the shared train loop needs to know about a job.

    Attributes:
      init: `key -> params`.
      prepare: `(frozen, batch, key) -> batch`, everything before the gradient (normalise, tokenise,
        mix).
      loss: `(params, batch, key, step) -> (loss_sum, sums)`. `sums["weight"]` divides the
        loss sum and the other sums; it must not depend on the parameters.
      evaluate: `(params, frozen, batch) -> sums` on held-out images; `batch["valid"]` marks
        padding.
      metrics: sums → scalars by name; "loss" is among them.
      evaluation_metrics: sums of a whole evaluation → numbers by name, on the host; None takes
        `metrics`. Names with a slash ("iou/road") are details: logged, not shown in one line.
      init_variables: `key -> variables`, for a model with state that no gradient trains. Given, the
        loss is `(params, variables, batch, key, step) -> (loss_sum, sums, new_variables)` and
        evaluation `(params, variables, frozen, batch) -> sums`. Micro-batches hand the variables on
        one after the other, and a skipped update leaves them as they were. A batch is global, so a
        plain mean over its first axis is already taken over all devices and hosts.
      only_for_training: parameters that evaluation does without: a path, or a module that holds
        them. What else a checkpoint lacks can't be evaluated.
      sharding_rules: for parameters that `sharding.SHARDING_RULES` does not know; they come first.
      best: a metric on held-out images, larger is better; the checkpoint with the best value is
        kept. "" keeps none.
      frozen: parameters that are not trained (the tokenizer's), passed to prepare and evaluate.
      flops_per_image: of a training step, matmuls, forward and backward, for MFU.
    """

    init: Callable[[jax.Array], Params]
    prepare: Callable[[PyTree, Batch, jax.Array], Batch]
    loss: StatelessLoss | StatefulLoss
    evaluate: StatelessEvaluate | StatefulEvaluate
    metrics: Callable[[Sums], dict[str, jax.Array]]
    frozen: PyTree
    flops_per_image: float
    evaluation_metrics: Callable[[Sums], dict[str, float]] | None = None
    best: str = ""
    init_variables: Callable[[jax.Array], Variables] | None = None
    only_for_training: tuple[str, ...] = ()
    sharding_rules: optim.Rules[PartitionSpec] = ()


def stateful_loss(task: Task) -> StatefulLoss:
    """The task's loss with variables in and out, whether or not it has any."""
    if task.init_variables is not None:
        return cast(StatefulLoss, task.loss)
    stateless = cast(StatelessLoss, task.loss)

    def loss(
        params: Params, variables: Variables, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums, Variables]:
        loss_sum, sums = stateless(params, batch, key, step)
        return loss_sum, sums, variables

    return loss


def stateful_evaluate(task: Task) -> StatefulEvaluate:
    """The task's evaluation, which takes variables whether or not it has any."""
    if task.init_variables is not None:
        return cast(StatefulEvaluate, task.evaluate)
    stateless = cast(StatelessEvaluate, task.evaluate)

    def evaluate(params: Params, variables: Variables, frozen: PyTree, batch: Batch) -> Sums:
        del variables  # {}
        return stateless(params, frozen, batch)

    return evaluate


def init_variables(task: Task, key: jax.Array) -> Variables:
    """The state that no gradient trains, as a run starts with it; {} for most tasks."""
    return {} if task.init_variables is None else task.init_variables(key)


def init_state(
    task: Task, optimizer: optax.GradientTransformation, key: jax.Array, *, average: bool = False
) -> TrainState:
    """A fresh train state; runs under `jax.jit` and `jax.eval_shape`."""
    return state_from_params(
        task.init(key),
        variables=init_variables(task, key),
        optimizer=optimizer,
        average=average,
    )


def state_from_params(
    params: Params,
    *,
    optimizer: optax.GradientTransformation,
    average: bool = False,
    variables: Variables | None = None,
) -> TrainState:
    """Step 0: these parameters and variables, a fresh optimizer and, if asked for, an average."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        variables=variables or {},
        ema=jax.tree.map(jnp.copy, params) if average else {},
        opt_state=optimizer.init(params),
        skipped=zero,
        skipped_in_row=zero,
    )


def state_shapes(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    average: bool = False,
) -> TrainState:
    """The train state's shapes, dtypes and shardings; nothing is materialised."""
    shapes = jax.eval_shape(
        lambda key: init_state(task, optimizer, key, average=average), jax.random.key(0)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        sharding.shardings(shapes, mesh, rules=task.sharding_rules),
    )


def train_step(
    state: TrainState,
    frozen: PyTree,
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
    loss = _loss_on_mesh(task, mesh)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = task.prepare(frozen, batch, jax.random.fold_in(key, PREPARATION))
    (gradients, sums), variables = _gradients(
        loss,
        state.params,
        state.variables,
        batch,
        key,
        state.step,
        micro_batches=config.accumulate,
    )
    metrics = task.metrics(sums)
    # Norm and clipped gradient of the mean, without an extra pass over memory to compute the mean.
    norm = optax.tree.norm(gradients) / sums["weight"]
    factor = optim.clip_factor(norm, limit=config.clip_norm) / sums["weight"]
    rate = schedule(state.step)
    new_state = _update(
        state,
        jax.tree.map(lambda g: g * factor, gradients),
        variables=variables,
        finite=jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]),
        rate=rate,
        optimizer=optimizer,
        ema_decay=config.ema_decay,
    )
    metrics |= {
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": new_state.skipped,
        "skipped_in_row": new_state.skipped_in_row,
    }
    return new_state, metrics


def jitted_step(
    task: Task,
    *,
    state: TrainState,
    config: OptimizerConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    steps: int,
    seed: int,
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """`train_step` under `jax.jit`, as a run compiles it: `(state, frozen, batch)`.

    It reuses the buffers of the state that it is given and returns one with the same shardings.

    Args:
      task: parameters, loss and metrics.
      state: arrays, or shapes with shardings (`state_shapes`).
      config: AdamW and its schedule.
      optimizer: made from it.
      steps: length of the run, for the schedule.
      seed: of the run.
      mesh: of the state's shardings.
    """
    function = functools.partial(
        train_step,
        task=task,
        config=config,
        optimizer=optimizer,
        schedule=optim.learning_rate(config, steps=steps),
        seed=seed,
        mesh=mesh,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(mesh, sharding.REPLICATED)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, replicated))


def _loss_on_mesh(task: Task, mesh: Mesh | None) -> StatefulLoss:
    """The task's loss as the devices of the mesh compute it together."""
    loss = stateful_loss(task)
    if mesh is None:
        return loss
    loss = sharding.on_mesh(loss, mesh)
    return _with_whole_parameters(loss, mesh) if mesh.shape[sharding.FSDP] > 1 else loss


def _update(
    state: TrainState,
    gradients: Params,
    *,
    variables: Variables,
    finite: jax.Array,
    rate: jax.Array,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float | None,
) -> TrainState:
    """The state after these gradients; where they are not finite, all but the counters is kept."""
    directions, opt_state = optimizer.update(
        gradients, state.opt_state, state.params, finite=finite
    )
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, directions)
    ema = {}
    if ema_decay is not None:
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params)

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    return TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        variables=keep(variables, state.variables),
        ema=keep(ema, state.ema),
        opt_state=opt_state,
        skipped=state.skipped + skipped,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1).astype(jnp.int32),
    )


def _with_whole_parameters(loss: StatefulLoss, mesh: Mesh) -> StatefulLoss:
    """`loss` with split parameters gathered first, and their gradients summed whole.

    By default the partitioner propagates a kernel's split to the activations, and then moves those
    between devices: many times the bytes of the parameters.
    """
    whole = NamedSharding(mesh, sharding.REPLICATED)

    def gathered(
        params: Params, variables: Variables, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums, Variables]:
        params = jax.lax.with_sharding_constraint(params, whole)
        return loss(params, variables, batch, key, step)

    return gathered


def _gradients(
    loss: StatefulLoss,
    params: Params,
    variables: Variables,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    *,
    micro_batches: int,
) -> tuple[tuple[Params, Sums], Variables]:
    """Gradients of the loss sum and the sums, over all micro-batches; the variables after them."""

    def with_auxiliary(
        params: Params, variables: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Sums, Variables]]:
        loss_sum, sums, new_variables = loss(params, variables, batch, key, step)
        _check_same_layout(new_variables, variables)
        return loss_sum, (sums, new_variables)

    def differentiate(
        variables: Variables, batch: Batch, key: jax.Array
    ) -> tuple[tuple[Params, Sums], Variables]:
        gradient = jax.grad(with_auxiliary, has_aux=True)
        gradients, (sums, variables) = gradient(params, variables, batch, key)
        return (gradients, sums), variables

    if micro_batches == 1:
        return differentiate(variables, batch, key)

    # Every k-th image goes into the same micro-batch: no image leaves its device.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0
        ),
        batch,
    )

    def add(
        carry: tuple[tuple[Params, Sums], Variables], micro: tuple[jax.Array, Batch]
    ) -> tuple[tuple[tuple[Params, Sums], Variables], None]:
        total, variables = carry
        index, part = micro
        result, variables = differentiate(variables, part, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, result), variables), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes, _ = jax.eval_shape(differentiate, variables, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, (zeros, variables), (jnp.arange(micro_batches), split))
    return total


def _check_same_layout(new: Variables, old: Variables) -> None:
    """Raises ValueError, while the step is traced, where a loss changes its variables' layout."""

    def layout(tree: Variables) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {optim.path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

    before, after = layout(old), layout(new)
    changed = [
        f"{name}: {before.get(name, 'absent')} became {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise ValueError(f"the loss must return variables as it got them; {'; '.join(changed)}")
