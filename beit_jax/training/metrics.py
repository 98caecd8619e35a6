"""Writes metrics to `metrics.jsonl`, to trackers (`writers`) and to the console."""

import time
from collections.abc import Mapping
from typing import SupportsFloat

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from beit_jax.hardware import peak_flops
from beit_jax.metrics_file import MetricsFile

# Part of this module's interface: the lines of a run.
from beit_jax.metrics_file import read as read
from beit_jax.training import writers
from beit_jax.training.same_run import Settings
from beit_jax.types import JsonObject

FILE = "metrics.jsonl"

# Counts that are written only where there is something to count: most runs never have any.
WHERE_ANY = ("images_by_pillow",)


class MetricsLog:
    """Writes scalars and pictures, on process 0 only.

    `metrics.jsonl` has every logged step exactly once (`metrics_file`). What TensorBoard and W&B
    have can't be changed: a step that was done again is there again.

    Args:
      workdir: the run's directory.
      start_step: where the run starts. Lines of later steps were written by a run that was cut off
        after its last checkpoint; they are dropped from `metrics.jsonl`, since those steps are
        repeated.
      project: of W&B; "" for none.
      config: the settings, for W&B's record.

    Raises:
      OSError: `metrics.jsonl` can't be read or written.
    """

    def __init__(
        self, workdir: str, *, start_step: int, project: str = "", config: Settings | None = None
    ):
        self._writers: list[writers.Writer] = []
        self._file: MetricsFile | None = None
        if jax.process_index() != 0:
            return
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(folder / FILE, start_step=start_step)
        self._writers = writers.open_writers(workdir, project=project, config=config or {})

    @property
    def held_out_at_start(self) -> JsonObject | None:
        """The held-out line of the first step (`MetricsFile`); None on other processes."""
        return None if self._file is None else self._file.held_out_at_start

    @property
    def online_at_start(self) -> JsonObject | None:
        """The line that an evaluation between steps left of the first step, in the same way."""
        return None if self._file is None else self._file.online_at_start

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Writes the numbers of a step; those that are not finite become null in the JSON."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._file.write(step, values)
        for writer in self._writers:
            writer.write_scalars(step, values)

    def write_picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a uint8 `[h, w, 3]` picture in every tracker."""
        for writer in self._writers:
            writer.write_images(step, {name: image[None]})

    def flush(self) -> None:
        """Brings everything to the disk, before a checkpoint says that its steps are done."""
        if self._file is not None:
            self._file.flush()
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        for writer in self._writers:
            writer.close()


class Clock:
    """Throughput, the share of time spent waiting for data, and the time left.

    Args:
      images_per_step: the global batch.
      flops_per_image: of a training step, for MFU.
      steps: of the whole run.
    """

    def __init__(self, *, images_per_step: int, flops_per_image: float, steps: int):
        self._images = images_per_step
        self._flops = flops_per_image
        self._steps = steps
        self._peak = peak_flops()
        self.restart(step=0)

    def restart(self, *, step: int) -> None:
        """Starts an interval; time since the last report (evaluation, saving) does not count."""
        self._since, self._step, self._waiting = time.perf_counter(), step, 0.0

    def waited(self, seconds: float) -> None:
        """Adds time that the loop has waited for a batch."""
        self._waiting += seconds

    def report(self, *, step: int) -> dict[str, float]:
        """The speed of the interval that ends at `step`."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        done = max(step - self._step, 1)
        per_second = done * self._images / seconds
        per_chip = per_second / jax.device_count()
        report = {
            "images_per_second": per_second,
            "images_per_second_per_chip": per_chip,
            "data_wait_share": self._waiting / seconds,
            "seconds_left": (self._steps - step) * seconds / done,
        }
        if self._peak is not None:
            report["mfu"] = per_chip * self._flops / self._peak
        return report


def console_line(
    step: int, *, steps: int, metrics: Mapping[str, float], speed: Mapping[str, float]
) -> str:
    """Progress, metrics, speed and the time left, in one line."""
    shown = [f"step {step:>{len(str(steps))}}/{steps}"]
    for name, value in metrics.items():
        if name == "learning_rate":
            shown.append(f"lr {value:.2e}")
        elif name in ("skipped", "skipped_in_row", "replaced_images", "images_by_pillow"):
            if value:
                shown.append(f"{name} {value:.0f}")
        else:
            shown.append(f"{name} {value:.4g}")
    speeds = [f"{speed['images_per_second']:.1f} img/s"]
    if jax.device_count() > 1:
        speeds.append(f"{speed['images_per_second_per_chip']:.1f} img/s/chip")
    if "mfu" in speed:
        speeds.append(f"mfu {speed['mfu']:.1%}")
    speeds.append(f"data wait {speed['data_wait_share']:.0%}")
    minutes, seconds = divmod(int(speed["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    speeds.append(f"eta {hours}:{minutes:02}:{seconds:02}")
    return "  ".join(shown) + "  |  " + "  ".join(speeds)


def sum_over_hosts(values: dict[str, float]) -> dict[str, float]:
    """Numbers of this host → those of all hosts together; all call it."""
    if jax.process_count() == 1:
        return values
    gathered = multihost_utils.process_allgather(np.asarray(list(values.values()), np.float32))
    return dict(zip(values, gathered.sum(axis=0).tolist(), strict=True))
