"""A pass over all held-out images, between steps, at the end of a run, or on its own."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding

from beit_jax import progress
from beit_jax.config import OptimizerConfig, RunConfig, check
from beit_jax.distributed import cluster
from beit_jax.files import write_json
from beit_jax.training import checkpoint, finite, optim, sharding, start, state
from beit_jax.training.job import Feed, Job
from beit_jax.training.state import StatefulEvaluate, Sums, Task, TrainState
from beit_jax.types import Batch, JsonObject, Params, PyTree, Variables

# A train state → its metrics; empty without held-out images, None where SIGTERM came.
Evaluator = Callable[[TrainState], dict[str, float] | None]


def evaluator(task: Task, feed: Feed, *, frozen: PyTree, mesh: Mesh) -> Evaluator:
    """`evaluate_state` of a job: a train state → its metrics on all held-out images."""
    evaluate = sharding.on_mesh(state.stateful_evaluate(task), mesh)
    if mesh.shape[sharding.FSDP] > 1:
        evaluate = _with_whole_parameters(evaluate, mesh)
    sums = jax.jit(
        evaluate,
        out_shardings=NamedSharding(mesh, sharding.REPLICATED),
    )
    run = functools.partial(run_evaluation, sums, task, feed, frozen, mesh)
    return functools.partial(evaluate_state, run)


def _with_whole_parameters(evaluate: StatefulEvaluate, mesh: Mesh) -> StatefulEvaluate:
    """`evaluate` with split parameters gathered first, as in a training step.

    By default the partitioner moves activations between devices instead: in a loop over the windows
    of an image, again for every window.
    """
    whole = NamedSharding(mesh, sharding.REPLICATED)

    def gathered(params: Params, variables: Variables, frozen: PyTree, batch: Batch) -> Sums:
        return evaluate(jax.lax.with_sharding_constraint(params, whole), variables, frozen, batch)

    return gathered


def run_evaluation(
    evaluate: Callable[[Params, Variables, PyTree, Batch], Sums],
    task: Task,
    feed: Feed,
    frozen: PyTree,
    mesh: Mesh,
    params: Params,
    variables: Variables,
) -> dict[str, float] | None:
    """Metrics over all held-out images; empty where there are none, None where SIGTERM came."""
    total = None
    batches = progress.over(
        feed.evaluation(),
        doing="evaluating held-out images (this host's)",
        size=lambda batch: len(next(iter(batch.values()))),
        shown=jax.process_index() == 0,
    )
    for batch in batches:
        if cluster.preemption_point():
            return None
        sums = evaluate(params, variables, frozen, sharding.to_devices(batch, mesh))
        total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
    if total is None:
        return {}
    metrics = task.metrics if task.evaluation_metrics is None else task.evaluation_metrics
    return {name: float(value) for name, value in metrics(total).items()}


def evaluate_state(
    evaluate: Callable[[Params, Variables], dict[str, float] | None], train_state: TrainState
) -> dict[str, float] | None:
    """`run_evaluation` of the parameters and, where there is one, of their average (`ema_*`).

    The average is of parameters only; it is evaluated with the variables as they are now.
    """
    result = evaluate(train_state.params, train_state.variables)
    if not result or not train_state.ema:
        return result
    averaged = evaluate(train_state.ema, train_state.variables)
    if averaged is None:
        return None
    return result | {f"ema_{name}": value for name, value in averaged.items()}


def evaluate_only(
    job: Job,
    *,
    run: RunConfig,
    optimizer_config: OptimizerConfig,
    config: checkpoint.Settings,
    workdir: str,
    mesh: Mesh,
) -> JsonObject:
    """Evaluates what training would start from; writes and returns `evaluation.json`.

    Args are those of `train`.

    Raises:
      ConfigError: there is neither a checkpoint in the run's directory nor `run.init_from`, or the
        checkpoint is another model's.
      Preempted: SIGTERM arrived.
      NonFiniteError: a result is NaN or infinite; nothing is written.
    """
    optimizer = optim.adamw(optimizer_config)
    shapes = start.state_shapes(job.task, optimizer, optimizer_config=optimizer_config, mesh=mesh)
    checkpoints = checkpoint.Checkpoints(
        workdir, run=run, config=config, identity=job.identity, read_only=True
    )
    check(
        bool(run.init_from) or checkpoints.latest_step() is not None,
        "config.run.init_from",
        f"nothing to evaluate: no checkpoint in {workdir} either",
    )
    checkpoints.check_config()
    train_state = start.restore_or_init(job.task, optimizer, checkpoints, shapes=shapes, run=run)
    checkpoints.close()
    frozen = sharding.replicate(job.task.frozen, mesh)
    evaluation = evaluator(job.task, job.feed, frozen=frozen, mesh=mesh)(train_state)
    step = int(train_state.step)
    if evaluation is None:
        raise cluster.Preempted(step)
    finite.check_evaluation(evaluation, step=step)
    summary = {"steps": step, **evaluation}
    if jax.process_index() == 0:
        path = f"{workdir}/evaluation.json"
        write_json(path, summary)
        print(f"{job.headline(evaluation)}  (step {step})  {path}")
    return summary
