"""`summary.json`: what a run reached and took."""

import json
import time
from typing import Any

import jax
from etils import epath

from beit_jax.training import loop


def write_summary(
    figures: dict[str, Any], *, trained: loop.Trained, workdir: str, began: float
) -> dict[str, Any]:
    """Writes and returns `summary.json`; the speed of an earlier call that did the work is kept.

    Args:
      figures: the job's own.
      trained: how the run ended.
      workdir: the run's directory.
      began: `time.perf_counter()` at the job's start.
    """
    path = epath.Path(workdir) / "summary.json"
    first = jax.process_index() == 0
    before = json.loads(path.read_text()) if first and path.exists() else {}
    speed, seconds = trained.images_per_second, time.perf_counter() - began
    first_step = trained.time_to_first_step
    if speed is None:  # nothing was left to do
        speed, seconds = before.get("images_per_second"), before.get("seconds", seconds)
        first_step = before.get("time_to_first_step")
    summary = {
        "steps": int(trained.state.step),
        **figures,
        "images_per_second": speed,
        "seconds": seconds,
        "time_to_first_step": first_step,
    }
    if first:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary
