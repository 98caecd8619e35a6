"""Length, batch, devices, logging and checkpoints."""

import dataclasses
from typing import Annotated, TypeAlias

from beit_jax.config.bounds import (
    INT32,
    Count,
    Matching,
    OneOf,
    ParameterName,
    PathOrNone,
    Period,
    PeriodOrNever,
    Seed,
    Within,
    check_fields,
)
from beit_jax.config.facts import FACTS
from beit_jax.config.parse import check, shown

Project: TypeAlias = Annotated[
    str,
    Matching(
        pattern=r"[\w.-]+( [\w.-]+)*", what="the name of a project at W&B", longest=128, empty=True
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batch, devices, logging and checkpoints, the same for every job."""

    steps: Count
    batch_size: Count  # global
    seed: Seed = 0
    fsdp: Count = 1  # devices over which parameters are sharded; the rest are data-parallel
    log_every: Period = 50  # steps
    eval_every: PeriodOrNever = 0  # steps; 0: only at the end
    eval_batches: PeriodOrNever = 0  # 0: every held-out image
    picture_every: PeriodOrNever = 0  # steps; 0: only at the end
    checkpoint_every: PeriodOrNever = 1000  # steps; 0: no
    # This often too (several hosts: at logged steps); 0: no. At most ten years.
    checkpoint_minutes: Annotated[float, Within(ge=0, le=5_256_000)] = 10.0
    keep_checkpoints: Annotated[int, Within(ge=2, le=INT32, why="one may be damaged")] = 3
    # Weights to start from: another run's workdir or checkpoint, a Hugging Face folder, a
    # .safetensors of timm, a .pth of unilm.
    init_from: PathOrNone = ""
    # Parameters init_from may lack, which start fresh, and parameters of it that may be left out.
    init_allow_missing: tuple[ParameterName, ...] = ()
    init_allow_unused: tuple[ParameterName, ...] = ()
    # Facts of init_from that may differ.
    init_allow_different: tuple[Annotated[str, OneOf(table=FACTS)], ...] = ()
    on_corrupt_checkpoint: Annotated[str, OneOf("fall_back", "fail")] = "fall_back"  # to one before
    print_sharding: bool = False  # prints at the start how parameters are split over devices
    # Where compiled programs are kept, see `training.startup.keep_compiled`: "auto", a folder, or
    # "" to leave JAX's settings alone.
    compilation_cache: PathOrNone = "auto"
    wandb: Project = ""  # of Weights & Biases (the extra [wandb]), which is told all; "": no

    def __post_init__(self) -> None:
        check_fields(self)
        check_needs_source(self, "init_allow_different")


def check_needs_source(run: RunConfig, *names: str, section: str = "") -> None:
    """Raises ConfigError for a setting about `init_from` where there is no `init_from`."""
    for name in names:
        value = getattr(run, name)
        check(
            bool(run.init_from) or not value,
            f"{section}{name}",
            f"{shown(value)} would have no effect without init_from; leave it empty",
        )
