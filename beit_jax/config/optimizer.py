"""The optimizer's settings."""

import dataclasses
from typing import Annotated

from beit_jax.config.bounds import Count, OneOf, Period, Rate, Whole, Within, check_fields
from beit_jax.config.parse import check, presence_setting, unit_setting
from beit_jax.config.run import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (paper table 12). The learning rate is absolute: it is not scaled with the batch.

    `schedule`, after and during the warm-up:
      "cosine": half a cosine from the peak; the warm-up is a line from 0 to the peak.
      "poly": a line from the peak at step 0; the warm-up is a factor from 1e-6 to 1 on it (mmseg's
        segmentation schedules, of power 1). It counts micro-batches.
    """

    learning_rate: Annotated[float, Within(gt=0, le=1000)]  # peak
    schedule: Annotated[str, OneOf("cosine", "poly")] = "cosine"
    min_learning_rate: Annotated[float, Within(ge=0, le=1000)] = 1e-5  # where the schedule ends
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
    # Weight decay of the class token and the absolute positions (official segmentation).
    decay_class_token: bool = False
    freeze_encoder: bool = False  # only what comes after the encoder is trained
    hold_steps: Count = 1  # the rate changes only every this many steps
    # Of a moving average of the parameters, evaluated too; None: no average.
    ema_decay: Annotated[float, Within(gt=0, lt=1)] | None = presence_setting(None)

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            self.schedule == "cosine" or self.hold_steps == 1,
            "hold_steps",
            f'{self.hold_steps}, but the "poly" schedule changes with every step; set 1',
        )
        check(
            self.schedule == "cosine" or self.min_learning_rate <= self.learning_rate,
            "min_learning_rate",
            f"{self.min_learning_rate} is more than learning_rate, {self.learning_rate}, but the"
            ' "poly" schedule only falls',
        )


def check_warmup(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Raises ConfigError where the warm-up is longer than the run; for `__post_init__` of jobs."""
    check(
        optimizer.warmup_steps <= run.steps,
        "optimizer.warmup_steps",
        f"{optimizer.warmup_steps} is more than run.steps, {run.steps}",
    )
