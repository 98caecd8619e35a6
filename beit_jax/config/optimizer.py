"""The optimizer's settings."""

import dataclasses

from beit_jax.config.parse import check, presence_setting
from beit_jax.config.run import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (paper table 12). The learning rate is absolute: it is not scaled with the batch."""

    learning_rate: float  # peak
    min_learning_rate: float = 1e-5  # the cosine's end
    warmup_steps: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float | None = None  # global norm; None: no clipping
    accumulate: int = 1  # micro-batches per step
    max_bad_steps: int = 10  # non-finite updates in a row that end the run
    layer_decay: float = 1.0  # factor of the rate per layer away from the head; 1: none
    decay_relative_positions: bool = True  # weight decay of the relative-position tables
    hold_steps: int = 1  # the rate changes only every this many steps
    # Of a moving average of the parameters, evaluated too; None: no average.
    ema_decay: float | None = presence_setting(None)

    def __post_init__(self) -> None:
        check(self.learning_rate > 0, "learning_rate", "must be positive")
        check(self.min_learning_rate >= 0, "min_learning_rate", "must not be negative")
        check(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        check(self.accumulate >= 1, "accumulate", "must be at least 1")
        check(self.max_bad_steps >= 1, "max_bad_steps", "must be at least 1")
        check(self.weight_decay >= 0, "weight_decay", "must not be negative")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive or None")
        check(0 < self.layer_decay <= 1, "layer_decay", "must be in (0, 1]")
        check(self.hold_steps >= 1, "hold_steps", "must be at least 1")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "must be in (0, 1)")


def check_warmup(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Raises ConfigError where the warm-up is longer than the run; for `__post_init__` of jobs."""
    check(
        optimizer.warmup_steps <= run.steps,
        "optimizer.warmup_steps",
        f"{optimizer.warmup_steps} is more than run.steps, {run.steps}",
    )
