"""`summary.json`: what a run achieved and how long it took."""

import time

import jax
from absl import logging
from etils import epath

from beit_jax.files import write_json
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.training.job import Trained
from beit_jax.types import JsonObject


def read_summary(workdir: str) -> JsonObject:
    """The summary of an earlier call in this directory; {} where none can be read."""
    path = epath.Path(workdir) / "summary.json"
    try:
        return read_json_object(path, finite=False) if path.exists() else {}
    except JsonError as error:
        logging.warning("the summary of an earlier call is lost: %s", error)
        return {}


def write_summary(summary: JsonObject, *, workdir: str) -> str:
    """Writes `summary.json` on process 0 and returns its path."""
    path = f"{workdir}/summary.json"
    if jax.process_index() == 0:
        write_json(path, summary)
    return path


def summarize(figures: JsonObject, *, trained: Trained, workdir: str, began: float) -> JsonObject:
    """Writes and returns a training run's summary.

    Where no step was left to do, speed and times are those of the earlier call that did the work.

    Args:
      figures: the job's own part.
      trained: the result of the run.
      workdir: the run's directory.
      began: `time.perf_counter()` at the job's start.
    """
    timing = {
        "images_per_second": trained.images_per_second,
        "seconds": time.perf_counter() - began,
        "time_to_first_step": trained.time_to_first_step,
    }
    if trained.images_per_second is None:
        before = read_summary(workdir) if jax.process_index() == 0 else {}
        timing = {
            "images_per_second": before.get("images_per_second"),
            "seconds": before.get("seconds", timing["seconds"]),
            "time_to_first_step": before.get("time_to_first_step"),
        }
    summary = {"steps": int(trained.state.step), **figures, **timing}
    write_summary(summary, workdir=workdir)
    return summary
