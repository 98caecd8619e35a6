"""TensorBoard's event files, which may fail without a word less in `metrics.jsonl`."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from absl import logging

from beit_jax import storage


class Writer(Protocol):
    """What this package uses of clu's `MetricWriter`."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers by name."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 `[n, h, w, 3]`."""

    def flush(self) -> None:
        """Waits for everything to be written."""

    def close(self) -> None:
        """Flushes and ends."""


class Careful:
    """A writer of clu's that an error does not end the run with: it is logged, and ends the files.

    It runs in the thread of an `AsyncWriter`. The numbers are in `metrics.jsonl` as well, whose
    errors do end a run.

    Args:
      writer: a `clu.metric_writers.SummaryWriter`.
      workdir: where it writes, for the message.
    """

    def __init__(self, writer: Writer, *, workdir: str):
        self._writer, self._workdir = writer, workdir
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
        except Exception as error:  # TensorFlow has an error of its own for each of the system's
            self._failed = True
            said = storage.explain(error) or str(error).splitlines()[0][:200]
            logging.error(
                "NO MORE TENSORBOARD FILES in %s: %s; metrics.jsonl goes on, and the next start of"
                " the run writes new ones",
                self._workdir,
                said,
            )


def open_writer(workdir: str) -> Writer | None:
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
    return metric_writers.AsyncWriter(Careful(writer, workdir=workdir))
