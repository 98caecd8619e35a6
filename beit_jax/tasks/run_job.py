"""Runs any job that trains: mesh, data, training or evaluation alone, summary, pictures.

def build(config: MyConfig, context: RunContext) -> Job: ...

def run(config: MyConfig, *, workdir: str) -> JsonObject:
    return run_job(config, build=build, workdir=workdir)
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from absl import logging

from beit_jax.config import OptimizerConfig, RunConfig
from beit_jax.distributed import cluster
from beit_jax.drawing import sheets
from beit_jax.tasks.summary import summarize
from beit_jax.training import loop, run_directory, start
from beit_jax.training.job import Job, RunContext, Trained
from beit_jax.training.startup import Startup
from beit_jax.training.writers import check_wandb
from beit_jax.types import ConfigDataclass, JsonObject


class JobConfig(ConfigDataclass, Protocol):
    """What the config of every job has: a frozen dataclass with these sections."""

    @property
    def run(self) -> RunConfig:
        """Length, batch, devices, logging and checkpoints."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW and its schedule."""


C = TypeVar("C", bound=JobConfig)


def run_job(config: C, *, build: Callable[[C, RunContext], Job], workdir: str) -> JsonObject:
    """Trains, or only evaluates; leaves `summary.json` (`evaluation.json`) and the pictures behind.

    Args:
      config: the job's settings.
      build: makes the job; called once the batch is known to divide over the mesh.
      workdir: the run's directory, local or gs://.

    Returns:
      The summary.

    Raises:
      ConfigError: settings that do not fit together, before anything is compiled; another run is
        in the directory, or somebody else's files (`training/run_directory.py`).
      Preempted: SIGTERM arrived (see `cluster`); the checkpoint is complete.
      RunError: the run cannot go on.
    """
    began, timer = time.perf_counter(), Startup()
    check_wandb(config.run.wandb)
    mesh = loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    source = start.source_facts(config, run=config.run, workdir=workdir)
    with contextlib.ExitStack() as resources:
        # What only evaluates leaves alone what a run is writing at the same time.
        if getattr(config, "evaluate_only", False):
            run_directory.check_for_evaluation(workdir)
        else:
            resources.enter_context(run_directory.opened(workdir))
        context = RunContext(workdir=workdir, mesh=mesh, timer=timer, resources=resources)
        job = build(config, context)
        timer.done("data")
        if not job.evaluate_only:
            run_directory.check_pictures(workdir, ("first_batch", *job.pictures))
        settings = job.config or config
        start.check_data(source, settings, run=config.run)
        if job.evaluate_only:
            return loop.evaluate_only(
                job,
                run=config.run,
                optimizer_config=config.optimizer,
                config=settings,
                workdir=workdir,
                mesh=mesh,
            )
        trained = loop.train(
            job,
            run=config.run,
            optimizer_config=config.optimizer,
            config=settings,
            workdir=workdir,
            mesh=mesh,
            timer=timer,
        )
        summary = summarize(job.finish(trained), trained=trained, workdir=workdir, began=began)
        drawn = _draw(job, trained, workdir=workdir)
        cluster.barrier("to have the results")  # another job may read them next
        _log_end(trained, files=(*job.leaves, *drawn), workdir=workdir)
        return summary


def _draw(job: Job, trained: Trained, *, workdir: str) -> tuple[str, ...]:
    """Draws the job's pictures; the names of the files that this process wrote."""
    names = []
    for name, picture in job.pictures.items():
        drawn = picture(trained.state)
        if drawn is not None:
            sheets.save_png(f"{workdir}/{name}.png", drawn)
            names.append(f"{name}.png")
    return tuple(names)


def _log_end(trained: Trained, *, files: Iterable[str], workdir: str) -> None:
    """Says what was done and where the results lie."""
    steps = int(trained.state.step)
    results = ["summary.json", *files, *(["best"] if trained.best else []), f"checkpoints/{steps}"]
    logging.info(
        "%s in %s; there: %s",
        f"all {steps:,} steps were done already"
        if trained.images_per_second is None
        else f"done: {steps:,} steps",
        *(workdir, ", ".join(results)),
    )
