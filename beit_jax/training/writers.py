"""Where a run's numbers and pictures go beside `metrics.jsonl`: TensorBoard's files, and W&B.

    for writer in open_writers("runs/a", project=run.wandb, config=config):
        writer.write_scalars(50, {"loss": 6.2})
        writer.write_images(50, {"reconstruction": picture[None]})

All are given the same. An error of theirs is logged, ends that writer and nothing else: the numbers
are in `metrics.jsonl` as well, whose errors do end a run.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from absl import logging

from beit_jax import storage
from beit_jax.config import check
from beit_jax.training.wandb_writer import WandbWriter
from beit_jax.types import Json


class Writer(Protocol):
    """What a tracker can do; the methods of clu's `MetricWriter` that this package uses."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers by name."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 `[n, h, w, 3]`."""

    def flush(self) -> None:
        """Waits for everything to be written."""

    def close(self) -> None:
        """Flushes and ends."""


class Careful:
    """A writer that an error does not end the run with: it is logged, and ends the writer.

    Args:
      writer: what may fail.
      what: it is called, for the message: "TENSORBOARD FILES in runs/a".
      next_start: what the next start of the run does, for the message.
    """

    def __init__(self, writer: Writer, *, what: str, next_start: str):
        self._writer, self._what, self._next_start = writer, what, next_start
        self._failed = False

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers by name."""
        self._do("write_scalars", step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 `[n, h, w, 3]`."""
        self._do("write_images", step, images)

    def flush(self) -> None:
        """Waits for everything to be written."""
        self._do("flush")

    def close(self) -> None:
        """Flushes and ends."""
        self._do("close")

    def _do(self, name: str, *arguments: Any) -> None:
        if self._failed:
            return
        try:
            getattr(self._writer, name)(*arguments)
        except Exception as error:  # every library has errors of its own for each of the system's
            self._failed = True
            logging.error(
                "NO MORE %s: %s; metrics.jsonl goes on, and the next start of the run %s",
                *(self._what, _said(error), self._next_start),
            )


def _said(error: Exception) -> str:
    """An error in one line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return str(storage.explain(error) or first[:200])


def check_wandb(project: str, *, name: str = "config.run.wandb") -> None:
    """Raises ConfigError where runs are to go to W&B, but it is not installed. Imports nothing."""
    check(
        not project or importlib.util.find_spec("wandb") is not None,
        name,
        "needs wandb, which is not installed: pip install 'beit-jax[wandb]'",
    )


def open_writers(workdir: str, *, project: str, config: Json) -> list[Writer]:
    """All writers of a run; those that can't be had are left out, with a line in the log.

    Args:
      workdir: the run's directory, local or gs://.
      project: of W&B; "" for none.
      config: the settings, for the record: a dataclass or plain nested dicts.
    """
    writers = [open_tensorboard(workdir)]
    if project:
        writers.append(open_wandb(workdir, project=project, config=config))
    return [writer for writer in writers if writer is not None]


def open_tensorboard(workdir: str) -> Writer | None:
    """A writer with clu's interface; None, with a warning, where there can be none.

    That is where clu or TensorFlow is not installed, or the file can't be made.
    """
    try:
        # Imported here because clu imports TensorFlow, which this package must do without.
        from clu import metric_writers
    except ImportError as error:
        logging.warning("no TensorBoard files, only metrics.jsonl: %s", error)
        return None
    try:
        writer = metric_writers.SummaryWriter(workdir)
    except Exception as error:
        fault = storage.explain(error, path=workdir)
        if fault is None:
            raise
        logging.error("NO TENSORBOARD FILES: %s; metrics.jsonl is written all the same", fault)
        return None
    careful = Careful(writer, what=f"TENSORBOARD FILES in {workdir}", next_start="writes new ones")
    return metric_writers.AsyncWriter(careful)  # whose thread it runs in


def open_wandb(workdir: str, *, project: str, config: Json) -> Writer | None:
    """The run at Weights & Biases; None, with an error in the log, where it can't be opened."""
    try:
        writer = WandbWriter(workdir, project=project, config=config)
    except Exception as error:  # not logged in, no network, a run that was deleted there, ...
        logging.error(
            "NO W&B RUN in project %s: %s; metrics.jsonl is written all the same."
            " WANDB_MODE=offline needs neither a login nor a network",
            *(project, _said(error)),
        )
        return None
    return Careful(writer, what=f"OF THE RUN AT W&B, project {project}", next_start="resumes it")
