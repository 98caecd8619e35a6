"""What the checks of one job share: opened once, where the first check asks for it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax
from jax.sharding import Mesh

from beit_jax.doctor.finding import BlockedError
from beit_jax.doctor.parts import Parts, open_parts
from beit_jax.tasks.feed import image_sources
from beit_jax.tokenizers.loading import load_params
from beit_jax.training import optim, start
from beit_jax.training.state import TrainState
from beit_jax.types import HostBatch, Json, Params

if TYPE_CHECKING:
    from beit_jax.data.sources import Source
    from beit_jax.doctor.images import Photographs

SAMPLE = 32  # images of a batch that is only looked at
T = TypeVar("T")


class Context:
    """A job's config, the machine, and what is opened of both.

    Where opening something fails, the check that asks first gets the error, and says it; those that
    ask later get a `BlockedError`.

    Args:
      config: the job's frozen config.
      workdir: of the run.
      platform: that is required: "any", "tpu", "gpu" or "cpu".
      steps: training steps to time.
      seconds: how long reading is timed.
      untrained_tokenizer: the tokenizer is trained by an earlier job, whose file is not there yet:
        its weights are random, and its tokens say nothing.
      weights_come: an earlier job writes the weights to start from.

    Attributes:
      step_seconds: of a training step of the whole batch; None until it is measured.
    """

    def __init__(
        self,
        config: Json,
        *,
        workdir: str,
        platform: str = "any",
        steps: int = 5,
        seconds: float = 3.0,
        untrained_tokenizer: bool = False,
        weights_come: bool = False,
    ):
        self.config, self.workdir, self.platform = config, workdir, platform
        self.steps, self.seconds = steps, seconds
        self.untrained_tokenizer, self.weights_come = untrained_tokenizer, weights_come
        self.step_seconds: float | None = None
        self._opened: dict[str, object] = {}
        self._failed: dict[str, str] = {}

    def _once(self, what: str, make: Callable[[], T]) -> T:
        if what in self._failed:
            raise BlockedError(self._failed[what])
        if what not in self._opened:
            try:
                self._opened[what] = make()
            except BlockedError as error:
                self._failed[what] = str(error)
                raise
            except Exception:
                self._failed[what] = what
                raise
        return self._opened[what]  # type: ignore[return-value]

    @property
    def mesh(self) -> Mesh:
        """All devices; asking for it raises ConfigError where the batch does not divide."""
        accumulate = self.config.optimizer.accumulate
        return self._once(
            "the devices", lambda: start.open_mesh(run=self.config.run, accumulate=accumulate)
        )

    @property
    def sources(self) -> "tuple[Source, Source]":
        """The training and the held-out images."""
        return self._once("the images", lambda: image_sources(self.config.data))

    @property
    def photographs(self) -> "Photographs":
        """Facts of images that are spread over both sources."""
        from beit_jax.doctor.images import look_at

        return self._once("a look at the images", lambda: look_at(self.sources))

    @property
    def tokenizer_params(self) -> Params:
        """The weights of the job's tokenizer."""
        return self._once("the tokenizer", lambda: load_params(self.config.tokenizer))

    @property
    def parts(self) -> Parts:
        """The job's task and its feed, in batches of the size that the run has."""
        if self.config.run.batch_size == self.small_batch:
            return self.small_parts
        return self._once("the job", lambda: self._open(self.config.run.batch_size))

    @property
    def small_parts(self) -> Parts:
        """The same in batches of about 32 images."""
        return self._once("the job in small batches", lambda: self._open(self.small_batch))

    def _open(self, batch_size: int) -> Parts:
        sources = self.sources  # first: it costs the least
        params = self.tokenizer_params if self.config.task == "pretrain" else None
        run = dataclasses.replace(self.config.run, batch_size=batch_size)
        config = dataclasses.replace(self.config, run=run)
        return open_parts(config, sources=sources, tokenizer_params=params)

    @property
    def small_batch(self) -> int:
        """About 32 images, which divide as the run's batch does."""
        groups = getattr(getattr(self.config, "mixing", None), "groups", 1)
        unit = math.lcm(self.mesh.size * self.config.optimizer.accumulate, groups)
        return min(unit * math.ceil(SAMPLE / unit), self.config.run.batch_size)

    @property
    def batch(self) -> HostBatch:
        """A small batch of training images."""
        return self._once("a batch", lambda: next(iter(self.small_parts.feed.training(0))))

    @property
    def held_out(self) -> HostBatch | None:
        """The first small batch of held-out images; None where there are none."""
        return self._once(
            "the held-out images", lambda: next(iter(self.small_parts.feed.evaluation()), None)
        )

    @functools.cached_property
    def shapes(self) -> TrainState:
        """Shapes and shardings of the train state."""
        optimizer = self.config.optimizer
        return start.state_shapes(
            self.small_parts.task,
            optim.adamw(optimizer),
            optimizer_config=optimizer,
            mesh=self.mesh,
        )

    @property
    def per_device(self) -> int:
        """Images of a micro-batch on one device."""
        return max(
            self.config.run.batch_size // (jax.device_count() * self.config.optimizer.accumulate), 1
        )
