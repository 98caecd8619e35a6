"""The train loop of every job: `train` sets up a run, a `TrainingRun` takes its steps.

trained = train(
    Job(task=task, feed=feed),
    run=config.run,
    optimizer_config=config.optimizer,
    config=config,
    workdir="runs/a",
)
"""

import collections
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from beit_jax.config import OptimizerConfig, RunConfig
from beit_jax.distributed import cluster
from beit_jax.training import (
    checkpoint,
    finite,
    metrics,
    optim,
    room,
    sharding,
    start,
    startup,
    state,
    writers,
)
from beit_jax.training.compilation import compile_step
from beit_jax.training.evaluation_pass import Evaluator, evaluator
from beit_jax.training.evaluation_pass import evaluate_only as evaluate_only
from beit_jax.training.evaluation_pass import run_evaluation as run_evaluation
from beit_jax.training.finite import NonFiniteError as NonFiniteError
from beit_jax.training.first_batch import FirstBatch

# Part of this module's interface: what a job hands to `train`, and what it gets back.
from beit_jax.training.job import Feed as Feed
from beit_jax.training.job import Job as Job
from beit_jax.training.job import Online as Online
from beit_jax.training.job import Trained as Trained
from beit_jax.training.job import joined
from beit_jax.training.start import open_mesh as open_mesh
from beit_jax.training.start import restore_or_init as restore_or_init
from beit_jax.training.state import TrainState
from beit_jax.types import Batch, JsonObject, PyTree
from beit_jax.types import HostBatch as HostBatch

# Steps that are dispatched before the host waits for the device: enough to hide the host's work,
# few enough to bound the batches in flight.
STEPS_IN_FLIGHT = 2

# One step on devices: (train state, frozen, batch) → train state, metrics.
Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train(
    job: Job,
    *,
    run: RunConfig,
    optimizer_config: OptimizerConfig,
    config: checkpoint.Settings,
    workdir: str,
    mesh: Mesh | None = None,
    timer: startup.Startup | None = None,
) -> Trained:
    """Trains up to `run.steps`, starting from whatever the run's directory holds.

    Args:
      job: parameters, loss, data and pictures.
      run: length, batch, logging, checkpoints.
      optimizer_config: AdamW and its schedule.
      config: the job's config, saved beside the checkpoints; a dataclass says what they fix.
      workdir: the run's directory.
      mesh: from `open_mesh`; None opens one.
      timer: measures the time to the first step; None starts one.

    Raises:
      ConfigError: settings that do not fit together, before anything is compiled.
      Preempted: SIGTERM arrived (see `cluster`); the checkpoint is complete.
      NonFiniteError: `optimizer_config.max_bad_steps` updates in a row were not finite, or what is
        to be saved or reported is not.
      StorageError: a disk is full or fails; no half checkpoint is left.
    """
    began = time.perf_counter()
    under_way = open_run(
        job,
        run=run,
        optimizer_config=optimizer_config,
        config=config,
        workdir=workdir,
        mesh=mesh or open_mesh(run=run, accumulate=optimizer_config.accumulate),
        timer=timer or startup.Startup(),
    )
    with room.reported(workdir, state=under_way.state), contextlib.closing(under_way):
        under_way.catch_up()
        if under_way.step < run.steps:
            under_way.do_steps()
            under_way.save()
        else:
            under_way.write_config()
        evaluation = under_way.evaluate()
        if under_way.observes(last=True):
            under_way.observe()
        finite.check_updates(under_way.state, limit=optimizer_config.max_bad_steps)
        finite.check_evaluation(evaluation, step=under_way.step)
    cluster.barrier("to have the last checkpoint")
    cluster.set_running(False)
    return Trained(
        state=under_way.state,
        evaluation=evaluation,
        best=under_way.best,
        images_per_second=float(np.median(under_way.speeds)) if under_way.speeds else None,
        seconds=time.perf_counter() - began,
        time_to_first_step=under_way.time_to_first_step,
    )


def open_run(
    job: Job,
    *,
    run: RunConfig,
    optimizer_config: OptimizerConfig,
    config: checkpoint.Settings,
    workdir: str,
    mesh: Mesh,
    timer: startup.Startup,
) -> "TrainingRun":
    """Restores or initialises the train state, while the first batch is being read.

    Args are those of `train`.
    """
    writers.check_wandb(run.wandb)
    optimizer = optim.adamw(optimizer_config)
    shapes = start.state_shapes(job.task, optimizer, optimizer_config=optimizer_config, mesh=mesh)
    start.log_size(shapes, mesh)
    if run.print_sharding and jax.process_index() == 0:
        print(sharding.table(shapes.params))

    checkpoints = checkpoint.Checkpoints(
        workdir, run=run, config=config, identity=job.identity, counts=job.feed.counts
    )
    checkpoints.check_shared()
    checkpoints.check_config()
    expected = checkpoints.latest_step() or 0
    room.check(shapes, run=run, workdir=workdir, step=expected, keeps_best=bool(job.task.best))
    first = FirstBatch(job.feed.training, step=expected) if expected < run.steps else None
    try:
        train_state = restore_or_init(job.task, optimizer, checkpoints, shapes=shapes, run=run)
        checkpoints.check_best(start=int(train_state.step))
        if jax.process_count() > 1:
            frozen = start.digest(job.task.frozen)
            cluster.check_agreement("parameters that are not trained", frozen)
        under_way = TrainingRun(
            job,
            train_state,
            first=first,
            run=run,
            optimizer_config=optimizer_config,
            optimizer=optimizer,
            mesh=mesh,
            checkpoints=checkpoints,
            log=metrics.MetricsLog(
                workdir, start_step=int(train_state.step), project=run.wandb, config=config
            ),
            timer=timer,
        )
        timer.done("state")
    except BaseException:
        if first:
            first.leave()
        raise
    return under_way


class TrainingRun:
    """A run in progress: its train state, and everything that happens to it between steps.

    Args:
      job: the task, the feed and the pictures.
      train_state: where to start; its buffers are reused.
      first: reads the first batch already; None where no step is left, since a run with no step
        left reads no images.
      run: length, batch, logging, checkpoints.
      optimizer_config: AdamW and its schedule.
      optimizer: made from it.
      mesh: of the train state's shardings.
      checkpoints: the run's directory.
      log: receives metrics and pictures.
      timer: measures the time to the first step.

    Attributes:
      state: the newest train state.
      step: steps done.
      speeds: images per second of each logged interval.
      best: the best evaluation so far (`Trained.best`).
      time_to_first_step: seconds by phase; None until the first step is done.
    """

    def __init__(
        self,
        job: Job,
        train_state: TrainState,
        *,
        first: FirstBatch | None,
        run: RunConfig,
        optimizer_config: OptimizerConfig,
        optimizer: optax.GradientTransformationExtraArgs,
        mesh: Mesh,
        checkpoints: checkpoint.Checkpoints,
        log: metrics.MetricsLog,
        timer: startup.Startup,
    ):
        self.state = train_state
        self.step = self._start = int(train_state.step)
        self.speeds: list[float] = []
        self.best: JsonObject | None = None
        self.time_to_first_step: dict[str, float] | None = None
        self._job, self._run, self._mesh = job, run, mesh
        self._first = first
        self._optimizer_config, self._optimizer = optimizer_config, optimizer
        self._checkpoints, self._log, self._timer = checkpoints, log, timer
        # Only process 0 has the log, and an evaluation needs all of them.
        self._was_observed = cluster.gather(
            "online results of the first step", log.online_at_start is not None
        )[0]
        self._frozen = sharding.replicate(job.task.frozen, mesh)
        self._evaluate: Evaluator = evaluator(job.task, job.feed, frozen=self._frozen, mesh=mesh)
        self._clock = metrics.Clock(
            images_per_step=run.batch_size,
            flops_per_image=job.task.flops_per_image,
            steps=run.steps,
        )
        # Metrics of steps that the device may still be working on, by the number of the step.
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._metrics: dict[str, jax.Array] = {}  # of the newest step

    def catch_up(self) -> None:
        """Does what was due at the step that the run starts from, where it was not done.

        A run that is killed, or told to stop in an evaluation, may leave a checkpoint of a step
        whose evaluation and pictures did not happen; after that step they are never due again. The
        held-out line is the last thing that an evaluation leaves behind, so it says that all of it
        was done. Nobody notes whether pictures were drawn: they are drawn again.
        """
        step = self.step
        if self._evaluates(step) and not self._was_evaluated():
            logging.info("step %d was not evaluated before the run ended; that is done now", step)
            self.evaluate()
            self._timer.done("missed evaluation")
        if self.observes():
            self.observe()
            self._timer.done("missed evaluation")
        if step and self._draws(step):
            self.draw()

    def _was_evaluated(self) -> bool:
        """Whether the first step's held-out line is there, and the best parameters up to it."""
        best = self._checkpoints.best() if self._job.task.best else None
        line = self._log.held_out_at_start
        done = line is not None
        if line is not None and self._job.task.best:
            # An older version wrote the line before it saved the parameters.
            names = (f"eval_{self._job.task.best}", f"eval_ema_{self._job.task.best}")
            values = [value for name in names if (value := line.get(name)) is not None]
            done = not values or (best is not None and best["value"] >= max(values))
        # Only process 0 has the log, and an evaluation needs all of them.
        return bool(cluster.gather("held-out results of the first step", done)[0])

    def do_steps(self) -> None:
        """Trains until `run.steps`; there is at least one step to do."""
        start_batches = self._first.batches if self._first else self._job.feed.training
        batches = start_batches(self.step)
        batch = sharding.to_devices(next(batches), self._mesh)
        self._timer.done("first batch")
        compiled = self._compile(batch)
        # Not before: what is refused up to here leaves the run's record as it was.
        self.write_config()
        self._timer.done("compile")
        self._clock.restart(step=self.step)
        cluster.set_running(True)
        while True:
            if cluster.preemption_point():
                self.leave()
            self._do_step(compiled, batch)
            if self.step == self._run.steps:
                self._do_what_is_due()
                return
            # The device works on the step just dispatched while the host fetches the next batch.
            waiting = time.perf_counter()
            on_host = next(batches)
            self._clock.waited(time.perf_counter() - waiting)
            batch = {}  # frees the old batch before the next one takes memory
            batch = sharding.to_devices(on_host, self._mesh)
            self._do_what_is_due()

    def write_config(self) -> None:
        """Records the settings and the start, now that the run is known to go on."""
        online = self._job.online
        self._checkpoints.write_config(
            known={**self._job.known, **(online.known if online else {})}
        )

    def _compile(self, batch: Batch) -> Step:
        """Compiles the step for these shapes and shardings; it reuses the state's buffers."""
        jitted = state.jitted_step(
            self._job.task,
            state=self.state,
            config=self._optimizer_config,
            optimizer=self._optimizer,
            steps=self._run.steps,
            seed=self._run.seed,
            mesh=self._mesh,
        )
        return compile_step(jitted, self.state, self._frozen, batch)

    def _do_step(self, compiled: Step, batch: Batch) -> None:
        """Dispatches one step; waits only for steps further back than `STEPS_IN_FLIGHT`."""
        self.state, self._metrics = compiled(self.state, self._frozen, batch)
        self.step += 1
        self._in_flight.append((self.step, self._metrics))
        if self.time_to_first_step is None:
            jax.block_until_ready(self._metrics)
            self._timer.done("step")
            self.time_to_first_step = self._timer.finish()
        self._settle(STEPS_IN_FLIGHT)

    def _settle(self, in_flight: int) -> None:
        """Waits until at most `in_flight` steps are unfinished; checks the finished ones."""
        while len(self._in_flight) > in_flight:
            step, step_metrics = self._in_flight.popleft()
            finite.check_step(step, step_metrics, limit=self._optimizer_config.max_bad_steps)

    def _do_what_is_due(self) -> None:
        """Logs, evaluates, draws and saves after a step, where it is time to."""
        run, step = self._run, self.step
        logs = step % run.log_every == 0 or step == run.steps
        evaluates, draws, observes = self._evaluates(step), self._draws(step), self.observes()
        saves = self._checkpoints.due(step, meeting=logs)
        if not (logs or evaluates or observes or draws or saves):
            return
        self._settle(0)
        if logs:
            self.log()
        if evaluates:
            self.evaluate()
        if observes:
            self.observe()
        if draws:
            self.draw()
        if saves:
            self.save()
        self._clock.restart(step=step)

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation between steps is due; the last step's is `train`'s."""
        every = self._run.eval_every
        return bool(every) and 0 < step < self._run.steps and step % every == 0

    def observes(self, *, last: bool = False) -> bool:
        """Whether the job's own evaluation (`Job.online`) of the newest step is due, and not done.

        Args:
          last: asks for the run's last step, which has one in any case.
        """
        online, step = self._job.online, self.step
        if online is None or (step == self._run.steps) != last or not step:
            return False
        if step == self._start and bool(self._was_observed):
            return False
        return last or step % online.every == 0

    def _draws(self, step: int) -> bool:
        every = self._run.picture_every
        return bool(self._job.pictures) and bool(every) and step % every == 0

    def log(self) -> None:
        """Writes the newest step's metrics and the speed since the last time."""
        values = {name: float(value) for name, value in self._metrics.items()}
        counts = metrics.sum_over_hosts(self._job.feed.metrics())
        values |= {k: v for k, v in counts.items() if v or k not in metrics.WHERE_ANY}
        speed = self._clock.report(step=self.step)
        self.speeds.append(speed["images_per_second"])
        self._log.write(self.step, values | speed)
        line = metrics.console_line(self.step, steps=self._run.steps, metrics=values, speed=speed)
        logging.info("%s", line)
        self._checkpoints.check()

    def evaluate(self) -> dict[str, float]:
        """Evaluates on all held-out images, keeps the best parameters and logs the result.

        The log's line comes last: who finds it knows that all was done. A kill before it means
        that the evaluation is repeated, from this step's checkpoint (`catch_up`) or an earlier
        one's; the best parameters, where they were saved already, are then found as good as these.

        Raises:
          Preempted: SIGTERM arrived meanwhile; the checkpoint is complete.
        """
        evaluation = self._evaluate(self.state)
        if evaluation is None:
            self.leave()
        self.best = self._keep_best(evaluation)
        if evaluation:
            self._log.write(self.step, {f"eval_{name}": v for name, v in evaluation.items()})
            logging.info("step %d held-out: %s", self.step, joined(evaluation))
        return evaluation

    def _keep_best(self, evaluation: Mapping[str, float]) -> JsonObject | None:
        """Saves the parameters (or their average) where they are the best so far."""
        metric = self._job.task.best
        if not metric or not evaluation:
            return None
        candidates = [(evaluation[metric], "last", self.state.params)]
        if self.state.ema:
            candidates.append((evaluation[f"ema_{metric}"], "ema", self.state.ema))
        candidates = [one for one in candidates if np.isfinite(one[0])]
        best = self._checkpoints.best()
        if not candidates:
            return best
        value, weights, params = max(candidates, key=lambda candidate: candidate[0])
        # Evaluated again after a restart, and not as before: there is nothing as good any more.
        again = best is not None and best.get("step") == self.step and best["value"] != value
        if best is None or again or value > best["value"]:
            finite.check_state(self.state, mesh=self._mesh, saved=self._checkpoints.latest_step())
            note = {"metric": metric, "value": value, "weights": weights}
            self._checkpoints.save_best(
                params, variables=self.state.variables, step=self.step, note=note
            )
            best = self._checkpoints.best()
        return best

    def observe(self) -> None:
        """Does the job's own evaluation, and logs what it finds.

        Raises:
          Preempted: SIGTERM arrived meanwhile; the checkpoint is complete.
        """
        assert self._job.online is not None
        found = self._job.online.measure(self.state)
        if found is None:
            self.leave()
        if found:
            self._log.write(self.step, found)
            logging.info("step %d online: %s", self.step, joined(found))

    def draw(self) -> None:
        """Draws the job's pictures for the trackers."""
        for name, picture in self._job.pictures.items():
            drawn = picture(self.state)
            if drawn is not None:
                self._log.write_picture(self.step, name, drawn)

    def save(self) -> None:
        """Starts saving a checkpoint in the background.

        Raises:
          NonFiniteError: the train state holds NaN or infinities; it is not saved.
        """
        saved = self._checkpoints.latest_step()
        finite.check_state(self.state, mesh=self._mesh, saved=saved)
        self._log.flush()  # a checkpoint's steps are never logged again
        self._checkpoints.save(self.state, step=self.step)

    def leave(self) -> NoReturn:
        """Saves and ends the run, because SIGTERM arrived.

        Raises:
          Preempted: always; the checkpoint is complete once `close` returns.
        """
        self._settle(0)
        self.save()
        raise cluster.Preempted(self.step)

    def close(self) -> None:
        """Waits for the last checkpoint, and for a first batch that nobody took; ends the log."""
        if self._first is not None:
            self._first.leave()
        try:
            self._checkpoints.close()
        finally:
            self._log.close()
