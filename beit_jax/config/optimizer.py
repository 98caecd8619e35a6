"""The optimizer's settings."""

import dataclasses
from typing import Annotated

from beit_jax.config.bounds import Count, Period, Rate, Whole, Within, check_fields
from beit_jax.config.parse import check, presence_setting, unit_setting
from beit_jax.config.run import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (paper table 12). The learning rate is absolute: it is not scaled with the batch."""

    learning_rate: Annotated[float, Within(gt=0, le=1000)]  # peak
    min_learning_rate: Annotated[float, Within(ge=0, le=1000)] = 1e-5  # the cosine's end
    warmup_steps: Whole
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    epsilon: Annotated[float, Within(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Within(ge=0, le=1000)] = 0.05
    # Global norm; None: no clipping.
    clip_norm: Annotated[float, Within(gt=0, le=1_000_000)] | None = None
    accumulate: Count = 1  # micro-batches per step
    max_bad_steps: Period = 10  # non-finite updates in a row that end the run
    # Factor of the rate per layer away from the head; 1: none.
    layer_decay: Annotated[float, Within(gt=0, le=1)] = unit_setting(1.0)
    decay_relative_positions: bool = True  # weight decay of the relative-position tables
    hold_steps: Count = 1  # the rate changes only every this many steps
    # Of a moving average of the parameters, evaluated too; None: no average.
    ema_decay: Annotated[float, Within(gt=0, lt=1)] | None = presence_setting(None)

    def __post_init__(self) -> None:
        check_fields(self)


def check_warmup(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Raises ConfigError where the warm-up is longer than the run; for `__post_init__` of jobs."""
    check(
        optimizer.warmup_steps <= run.steps,
        "optimizer.warmup_steps",
        f"{optimizer.warmup_steps} is more than run.steps, {run.steps}",
    )
