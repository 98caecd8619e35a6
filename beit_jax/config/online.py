"""Settings of the evaluation between the steps of pre-training."""

import dataclasses
from typing import Annotated

from beit_jax.config.bounds import (
    PeriodOrNever,
    Whole,
    Within,
    check_fields,
)
from beit_jax.config.data import ImageSourceOrNone, Split
from beit_jax.config.parse import check, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """How pre-training tells what its features are worth while it runs (`tasks/online.py`).

    Off in the recipes. An evaluation passes `bank` and `queries` images through three quarters of
    the encoder, and as many held-out images as `queries` through both that and the whole model: at
    the defaults it computes as much as training does for 5,000 images. Every 3,125 steps of 2,048
    images, as often as `beit_base` looks at its held-out loss, that is 0.1 % of the run, and the
    hosts decode 14,000 images more. Its seconds are logged, as `online_seconds`;
    `bench/online.py` measures the share.

    Attributes:
      every: steps; 0: never. Where it is on, the last step is evaluated too.
      source: labelled images whose training part is the bank and whose held-out part asks, as
        `config.data.source` is written; "": the run's own images, where they have classes. The four
        settings after it belong to it.
      bank: labelled training images that vote, evenly spaced over all; 0: all.
      queries: labelled held-out images that ask, and held-out images of the run whose features and
        predicted tokens are looked at; evenly spaced over all; 0: all.
      neighbours: that vote.
      block: whose output is compared, from 1; 0: at three quarters of the depth (9 of 12, the best
        one in the paper's appendix D).
      eval_crop: of the labelled images, as `config.data.augment.eval_crop` of a probe.
    """

    every: PeriodOrNever = 0
    source: ImageSourceOrNone = ""
    split: Split = "train"
    eval_source: ImageSourceOrNone = ""
    eval_split: Split = "validation"
    holdout: Whole = 0
    bank: Whole = 10_000
    queries: Whole = 2_000
    neighbours: Annotated[int, Within(ge=1, le=1_000_000)] = 10
    block: Annotated[int, Within(ge=0, le=1_000)] = 0
    eval_crop: Annotated[float, Within(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name in ("split", "eval_source", "eval_split", "holdout"):
            value, default = getattr(self, name), fields[name].default
            check(
                bool(self.source) or value == default,
                name,
                f"{shown(value)} would have no effect without source; leave it {shown(default)}",
            )
