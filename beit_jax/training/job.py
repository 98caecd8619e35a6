"""What a job brings to the train loop, what it is given, and how it ends."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from beit_jax.training import sharding
from beit_jax.training.checkpoint import Settings
from beit_jax.training.startup import Startup
from beit_jax.training.state import Task, TrainState
from beit_jax.types import HostBatch, Json, JsonObject, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
    """The data of a job.

    Attributes:
      training: `start_step -> iterator` over this host's part of every global batch, without end.
      evaluation: starts a pass over this host's part of the held-out images.
      metrics: numbers about the data so far (images replaced, say); summed over the hosts.
      counts: how many images there are, by the setting that they come from. A run whose folder has
        grown goes on, with a warning.
    """

    training: Callable[[int], Iterator[HostBatch]]
    evaluation: Callable[[], Iterable[HostBatch]]
    metrics: Callable[[], dict[str, float]]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a run.

    Attributes:
      state: the last train state.
      evaluation: metrics on the held-out images; those of the moving average as `ema_*`.
      best: the best value of the task's metric: `value`, `step` and `weights` ("last" or "ema");
        None where the task names no metric.
      images_per_second: median over the logged intervals; None where no step was left to do.
      seconds: of the whole call.
      time_to_first_step: seconds of each phase (`Startup.finish`); None where no step was left.
    """

    state: TrainState
    evaluation: dict[str, float]
    best: JsonObject | None
    images_per_second: float | None
    seconds: float
    time_to_first_step: dict[str, float] | None


# Draws a train state's work, uint8 `[h, w, 3]`. Every process calls it, since it may gather
# parameters; what process 0 returns is kept, None keeps nothing.
Picture = Callable[[TrainState], np.ndarray | None]


def _params(train_state: TrainState) -> Params:
    return train_state.params


def picture_of(
    draw: Callable[[Params], np.ndarray], *, of: Callable[[TrainState], Params] = _params
) -> Picture:
    """A picture drawn on process 0 from arrays that all processes gather together.

    Args:
      draw: arrays on the host → uint8 `[h, w, 3]`.
      of: what to draw of a train state, its parameters by default.
    """

    def picture(train_state: TrainState) -> np.ndarray | None:
        params = sharding.to_host(of(train_state))
        return draw(params) if jax.process_index() == 0 else None

    return picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online:
    """An evaluation of another kind than the held-out loss, now and then between steps.

    Attributes:
      every: steps; the last step has one too.
      measure: a train state → numbers by name (`online_*`), which go to the log; None where SIGTERM
        came. Every process calls it.
      known: numbers for `start.json`, beside those of `Job.known`.
    """

    every: int
    measure: Callable[[TrainState], dict[str, float] | None]
    known: Mapping[str, Json] = dataclasses.field(default_factory=dict)


def _evaluation_as_summary(trained: Trained) -> JsonObject:
    return dict(trained.evaluation)


def joined(evaluation: Mapping[str, float]) -> str:
    """Metrics in one line; those of a group ("iou/road") are left out."""
    return "  ".join(f"{name} {value:.4g}" for name, value in evaluation.items() if "/" not in name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is specific to one job; the loop does the rest.

    Attributes:
      task: parameters, loss and metrics.
      feed: the data.
      pictures: by name; drawn every `run.picture_every` steps for the trackers, and at the end into
        `NAME.png` of the run's directory.
      online: what else is evaluated between steps; None: nothing.
      finish: called by every process with the trained state; writes what the job leaves behind and
        returns its own part of `summary.json`.
      leaves: names of the files in the run's directory that `finish` writes.
      config: the settings as the job has completed them (with the images' classes, say), for the
        record; None: as they were parsed.
      identity: what the run depends on and no setting shows, by the setting that it comes from:
        digests of parameters that are not trained, say. A run can't go on with another one.
      known: numbers for `start.json`, by the names that the summary has for them.
      evaluate_only: no training; evaluates what training would start from.
      headline: an evaluation in one line, for `evaluate_only`.
    """

    task: Task
    feed: Feed
    pictures: Mapping[str, Picture] = dataclasses.field(default_factory=dict)
    online: Online | None = None
    finish: Callable[[Trained], JsonObject] = _evaluation_as_summary
    leaves: tuple[str, ...] = ()
    config: Settings | None = None
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    known: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    evaluate_only: bool = False
    headline: Callable[[Mapping[str, float]], str] = joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """What the loop has opened by the time it asks for a job.

    Attributes:
      workdir: the run's directory, local or gs://.
      mesh: all devices.
      timer: of the time to the first step; a job may name phases of its own.
      resources: closed when the run ends; for files that the job keeps open.
    """

    workdir: str
    mesh: Mesh
    timer: Startup
    resources: contextlib.ExitStack
