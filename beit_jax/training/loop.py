"""The train loop of every job: `train` reads like a table of contents."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from beit_jax.config import OptimizerConfig, RunConfig, RunError
from beit_jax.distributed import cluster
from beit_jax.training import checkpoint, metrics, optim, sharding, startup, state
from beit_jax.training.state import Task, TrainState
from beit_jax.types import Params, Variables

HostBatch = dict[str, np.ndarray]
# Steps dispatched before the host waits for the device: enough to hide the host's work, few enough
# to bound the batches in flight.
STEPS_IN_FLIGHT = 2


class NonFiniteError(RunError):
    """Too many updates in a row were not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
    """What a job reads.

    Attributes:
      training: `start_step -> iterator` of this host's part of every global batch, without end.
      evaluation: a fresh pass over the held-out images, this host's part.
      metrics: numbers about the data so far (images replaced, say).
    """

    training: Callable[[int], Iterator[HostBatch]]
    evaluation: Callable[[], Iterable[HostBatch]]
    metrics: Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended.

    Attributes:
      state: the last train state.
      evaluation: metrics on the held-out images; of the average, if there is one, as `ema_*`.
      best: the best of the task's metric over the run: `value`, `step` and `weights` ("last" or
        "ema"); None where the task names none.
      images_per_second: median over the logged intervals; None where no step was left to do.
      seconds: of the whole call.
      time_to_first_step: seconds from the start by what they went into (`Startup.finish`); None
        where no step was left to do.
    """

    state: TrainState
    evaluation: dict[str, float]
    best: dict[str, Any] | None
    images_per_second: float | None
    seconds: float
    time_to_first_step: dict[str, float] | None


def train(
    task: Task,
    feed: Feed,
    *,
    run: RunConfig,
    optimizer_config: OptimizerConfig,
    config: checkpoint.Settings,
    workdir: str,
    picture: Callable[[TrainState], np.ndarray | None] | None = None,
    begun: startup.Startup | None = None,
) -> Trained:
    """Trains to `run.steps`, from wherever the run's directory stands.

    Args:
      task: the job.
      feed: its data.
      run: length, batch, logging, checkpoints.
      optimizer_config: AdamW and its schedule.
      config: the job's config, saved beside the checkpoints; a dataclass says what they fix.
      workdir: the run's directory.
      picture: draws the model's work, uint8 `[h, w, 3]`; called every `run.picture_every` steps, on
        every process, though only what process 0 draws is kept.
      begun: since when, and with what, the time to the first step has been running; None: now.

    Raises:
      ConfigError: something does not fit, before anything is compiled.
      Preempted: SIGTERM came (see `cluster`); the checkpoint is complete.
      NonFiniteError: `optimizer_config.max_bad_steps` updates in a row were not finite.
    """
    began = time.perf_counter()
    begun = begun or startup.Startup()
    mesh = open_mesh(run=run, accumulate=optimizer_config.accumulate)
    optimizer = optim.adamw(optimizer_config)
    schedule = optim.learning_rate(optimizer_config, steps=run.steps)
    average = optimizer_config.ema_decay is not None
    shapes = state.state_shapes(task, optimizer, mesh, average=average)
    _log_size(shapes, mesh)
    if run.print_sharding and jax.process_index() == 0:
        print(sharding.table(shapes.params))

    checkpoints = checkpoint.Checkpoints(workdir, run=run, config=config)
    checkpoints.write_config()
    expected = checkpoints.latest_step() or 0
    first = FirstBatch(feed.training, step=expected) if expected < run.steps else None
    train_state = restore_or_init(task, optimizer, checkpoints, shapes=shapes, run=run)
    start_step = int(train_state.step)
    log = metrics.MetricsLog(workdir, start_step=start_step)
    cluster.check_agreement("parameters that are not trained", _digest(task.frozen))
    frozen = sharding.replicate(task.frozen, mesh)
    begun.done("state")
    evaluate = evaluator(task, feed, frozen=frozen, mesh=mesh)
    keep_best = functools.partial(_keep_best, checkpoints, task.best)

    step_function = functools.partial(
        state.train_step,
        task=task,
        config=optimizer_config,
        optimizer=optimizer,
        schedule=schedule,
        seed=run.seed,
        mesh=mesh,
    )
    speeds: list[float] = []
    seconds_to_first = None
    try:
        if start_step < run.steps:
            train_state, speeds, seconds_to_first = _run_steps(
                step_function,
                train_state,
                frozen,
                task=task,
                feed=feed,
                batches=first.batches(start_step) if first else feed.training(start_step),
                run=run,
                max_bad_steps=optimizer_config.max_bad_steps,
                mesh=mesh,
                checkpoints=checkpoints,
                log=log,
                evaluate=evaluate,
                keep_best=keep_best,
                picture=picture,
                begun=begun,
            )
            checkpoints.save(train_state, step=run.steps)
        evaluation = evaluate(train_state)
        if evaluation is None:
            raise cluster.Preempted(run.steps)
        if evaluation:
            log.write(run.steps, {f"eval_{name}": value for name, value in evaluation.items()})
            logging.info("step %d held-out: %s", run.steps, _join(evaluation))
        best = keep_best(train_state, evaluation, step=run.steps)
    finally:
        checkpoints.close()
        log.close()
    cluster.barrier("to have the last checkpoint")
    cluster.set_running(False)
    return Trained(
        state=train_state,
        evaluation=evaluation,
        best=best,
        images_per_second=float(np.median(speeds)) if speeds else None,
        seconds=time.perf_counter() - began,
        time_to_first_step=seconds_to_first,
    )


class FirstBatch:
    """Reads the first batch in the background, while the state is made or restored.

    Args:
      training: `Feed.training`.
      step: where the run will most likely start.
    """

    def __init__(self, training: Callable[[int], Iterator[HostBatch]], *, step: int):
        self._training, self._step = training, step
        self._read: concurrent.futures.Future = concurrent.futures.Future()
        # A daemon: should the state fail, nobody waits for the data.
        threading.Thread(target=self._start, name="first batch", daemon=True).start()

    def _start(self) -> None:
        try:
            batches = self._training(self._step)
            self._read.set_result((next(batches), batches))
        except BaseException as error:  # raised where the batch is wanted
            self._read.set_exception(error)

    def batches(self, step: int) -> Iterator[HostBatch]:
        """The batches from `step` on; raises what went wrong with the first."""
        if step != self._step:  # the newest checkpoint could not be read
            yield from self._training(step)
            return
        batch, batches = self._read.result()
        yield batch
        yield from batches


def open_mesh(*, run: RunConfig, accumulate: int) -> Mesh:
    """The mesh of all devices, once the batch is known to divide over it."""
    mesh = sharding.make_mesh(fsdp=run.fsdp)
    sharding.check_batch(
        run.batch_size, accumulate=accumulate, mesh=mesh, processes=jax.process_count()
    )
    return mesh


def restore_or_init(
    task: Task,
    optimizer: Any,
    checkpoints: checkpoint.Checkpoints,
    *,
    shapes: TrainState,
    run: RunConfig,
) -> TrainState:
    """The state to start from; the order of precedence is `checkpoint`'s module docstring."""
    restored = checkpoints.restore(shapes)
    if restored is not None:
        logging.info("resumed at step %d of %d", int(restored.step), run.steps)
        return restored
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    if run.init_from:
        params = checkpoint.restore_params(
            run.init_from,
            shapes=shapes.params,
            fresh=lambda: jax.jit(task.init, out_shardings=places.params)(jax.random.key(run.seed)),
            allow_missing=run.init_allow_missing,
            allow_unused=run.init_allow_unused,
        )
        logging.info("parameters from %s", run.init_from)
        variables = checkpoint.restore_variables(
            run.init_from,
            shapes=shapes.variables,
            fresh=lambda: jax.jit(
                functools.partial(state.init_variables, task), out_shardings=places.variables
            )(jax.random.key(run.seed)),
        )
        fresh = functools.partial(
            state.state_from_params, optimizer=optimizer, average=bool(shapes.ema)
        )
        return jax.jit(fresh, out_shardings=places)(params, variables=variables)
    fresh = functools.partial(state.init_state, task, optimizer, average=bool(shapes.ema))
    return jax.jit(fresh, out_shardings=places)(jax.random.key(run.seed))


def evaluator(
    task: Task, feed: Feed, *, frozen: Any, mesh: Mesh
) -> Callable[[TrainState], dict[str, float] | None]:
    """`evaluate_state` for this job: a train state → its metrics on all held-out images."""
    sums = jax.jit(
        sharding.on_mesh(state.stateful_evaluate(task), mesh),
        out_shardings=NamedSharding(mesh, sharding.REPLICATED),
    )
    run = functools.partial(run_evaluation, sums, task, feed, frozen, mesh)
    return functools.partial(evaluate_state, run)


def run_evaluation(
    evaluate: Callable,
    task: Task,
    feed: Feed,
    frozen: Any,
    mesh: Mesh,
    params: Params,
    variables: Variables,
) -> dict[str, float] | None:
    """Metrics over all held-out images; empty where there are none, None where SIGTERM came."""
    total = None
    for batch in feed.evaluation():
        if cluster.preemption_point():
            return None
        sums = evaluate(params, variables, frozen, sharding.to_devices(batch, mesh))
        total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
    if total is None:
        return {}
    return {name: float(value) for name, value in task.metrics(total).items()}


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


def _keep_best(
    checkpoints: checkpoint.Checkpoints,
    metric: str,
    train_state: TrainState,
    evaluation: dict[str, float],
    *,
    step: int,
) -> dict[str, Any] | None:
    """Saves the parameters (or their average) if they beat the best so far; what is best now."""
    if not metric or not evaluation:
        return None
    candidates = [(evaluation[metric], "last", train_state.params)]
    if train_state.ema:
        candidates.append((evaluation[f"ema_{metric}"], "ema", train_state.ema))
    value, weights, params = max(candidates, key=lambda each: each[0])
    best = checkpoints.best()
    if best is None or value > best["value"]:
        note = {"metric": metric, "value": value, "weights": weights}
        checkpoints.save_best(params, variables=train_state.variables, step=step, note=note)
        best = checkpoints.best()
    return best


def _run_steps(
    step_function,
    train_state,
    frozen,
    *,
    task,
    feed,
    batches,
    run,
    max_bad_steps,
    mesh,
    checkpoints,
    log,
    evaluate,
    keep_best,
    picture,
    begun,
):
    """Steps until `run.steps`, with everything that happens between them."""
    step = int(train_state.step)
    clock = metrics.Clock(
        images_per_step=run.batch_size, flops_per_image=task.flops_per_image, steps=run.steps
    )
    batch = sharding.to_devices(next(batches), mesh)
    begun.done("first batch")
    compiled = _compile(step_function, train_state, frozen, batch)
    begun.done("compile")
    seconds_to_first = None
    in_flight: collections.deque = collections.deque()
    speeds = []

    def leave():
        while in_flight:
            _stop_if_bad(*in_flight.popleft(), limit=max_bad_steps)
        checkpoints.save(train_state, step=step)  # complete when `train` is left
        raise cluster.Preempted(step)

    clock.restart(step=step)
    cluster.set_running(True)
    while step < run.steps:
        if cluster.preemption_point():
            leave()
        train_state, step_metrics = compiled(train_state, frozen, batch)
        step += 1
        in_flight.append((step, step_metrics))
        if seconds_to_first is None:
            jax.block_until_ready(step_metrics)
            begun.done("step")
            seconds_to_first = begun.finish()
        while len(in_flight) > STEPS_IN_FLIGHT:
            _stop_if_bad(*in_flight.popleft(), limit=max_bad_steps)
        if step < run.steps:
            # The device works on the step just dispatched while the host fetches the next batch.
            waiting = time.perf_counter()
            batch = next(batches)
            clock.waited(time.perf_counter() - waiting)
            batch = sharding.to_devices(batch, mesh)

        logs = step % run.log_every == 0 or step == run.steps
        evaluates = run.eval_every and step % run.eval_every == 0 and step < run.steps
        draws = picture is not None and run.picture_every and step % run.picture_every == 0
        saves = checkpoints.due(step, meeting=logs)
        if not (logs or evaluates or draws or saves):
            continue
        while in_flight:
            _stop_if_bad(*in_flight.popleft(), limit=max_bad_steps)
        if logs:
            values = {name: float(value) for name, value in step_metrics.items()}
            values |= _sum_over_hosts(feed.metrics())
            speed = clock.report(step=step)
            speeds.append(speed["images_per_second"])
            log.write(step, values | speed)
            logging.info(
                "%s", metrics.console_line(step, steps=run.steps, metrics=values, speed=speed)
            )
            checkpoints.check()
        if evaluates:
            evaluation = evaluate(train_state)
            if evaluation is None:
                leave()
            if evaluation:
                log.write(step, {f"eval_{name}": value for name, value in evaluation.items()})
                logging.info("step %d held-out: %s", step, _join(evaluation))
            keep_best(train_state, evaluation, step=step)
        if draws:
            drawn = picture(train_state)
            if drawn is not None:
                log.write_picture(step, "reconstruction", drawn)
        if saves:
            checkpoints.save(train_state, step=step)
        clock.restart(step=step)
    return train_state, speeds, seconds_to_first


def _compile(step_function, train_state, frozen, batch):
    """Compiles the step for these shapes and places; the state's buffers are reused."""
    began = time.perf_counter()
    places = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    everywhere = NamedSharding(train_state.step.sharding.mesh, sharding.REPLICATED)
    jitted = jax.jit(step_function, donate_argnums=0, out_shardings=(places, everywhere))
    with startup.cache_hits() as hits:
        compiled = jitted.lower(train_state, frozen, batch).compile()
        read = hits() > 0
    logging.info(
        "compiled the train step in %.1f s%s",
        time.perf_counter() - began,
        ", read from the compilation cache" if read else "",
    )
    return compiled


def _stop_if_bad(step: int, step_metrics: dict[str, jax.Array], *, limit: int) -> None:
    """Waits for a step's metrics; raises after `limit` skipped updates in a row.

    The parameters are those of the last good update, so checkpoints up to here are sound; none is
    written after this.
    """
    in_row = int(step_metrics["skipped_in_row"])
    if in_row:
        logging.warning(
            "step %d: loss %s, gradient norm %s: the update is skipped (%d in a row)",
            step,
            float(step_metrics["loss"]),
            float(step_metrics["grad_norm"]),
            in_row,
        )
    if in_row >= limit:
        raise NonFiniteError(
            f"step {step}: {in_row} updates in a row were not finite"
            f" (config.optimizer.max_bad_steps); loss {float(step_metrics['loss'])},"
            f" gradient norm {float(step_metrics['grad_norm'])}."
            " The last checkpoint is from before and sound."
        )


def _digest(tree: Any) -> str:
    """A hash of every array of this host's; empty in a process on its own, where nobody asks."""
    if jax.process_count() == 1:
        return ""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{optim.path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _sum_over_hosts(values: dict[str, float]) -> dict[str, float]:
    if jax.process_count() == 1:
        return values
    every = multihost_utils.process_allgather(np.asarray(list(values.values()), np.float32))
    return dict(zip(values, every.sum(axis=0).tolist(), strict=True))


def _log_size(shapes: TrainState, mesh: Mesh) -> None:
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))
    device = jax.devices()[0]
    logging.info(
        "%s parameters; %d × %s in a mesh of %s",
        f"{count:,}",
        jax.device_count(),
        device.device_kind,
        " × ".join(f"{name} {size}" for name, size in mesh.shape.items()),
    )


def _join(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
