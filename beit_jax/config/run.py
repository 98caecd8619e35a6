"""Length, batch, devices, logging and checkpoints."""

import dataclasses

from beit_jax.config.facts import FACTS
from beit_jax.config.parse import check, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batch, devices, logging and checkpoints, the same for every job."""

    steps: int
    batch_size: int  # global
    seed: int = 0
    fsdp: int = 1  # devices over which parameters are sharded; the rest are data-parallel
    log_every: int = 50  # steps
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 0  # 0: every held-out image
    picture_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 1000  # steps; 0: no
    checkpoint_minutes: float = 10.0  # this often too (several hosts: at logged steps); 0: no
    keep_checkpoints: int = 3
    # Weights to start from: another run's workdir or checkpoint, a Hugging Face folder, a
    # .safetensors of timm, a .pth of unilm.
    init_from: str = ""
    init_allow_missing: tuple[str, ...] = ()  # parameters init_from may lack; they start fresh
    init_allow_unused: tuple[str, ...] = ()  # parameters of init_from that may be left out
    init_allow_different: tuple[str, ...] = ()  # facts of init_from (`facts.FACTS`) that may differ
    on_corrupt_checkpoint: str = "fall_back"  # to the one before; or "fail"
    print_sharding: bool = False  # prints at the start how parameters are split over devices
    # Where compiled programs are kept, see `training.startup.keep_compiled`: "auto", a folder, or
    # "" to leave JAX's settings alone.
    compilation_cache: str = "auto"

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        check(self.batch_size >= 1, "batch_size", f"must be at least 1, got {self.batch_size}")
        check(self.fsdp >= 1, "fsdp", f"must be at least 1, got {self.fsdp}")
        check(self.log_every >= 1, "log_every", "must be at least 1")
        check(self.keep_checkpoints >= 2, "keep_checkpoints", "keep at least 2: one may be damaged")
        one_of(self.on_corrupt_checkpoint, "on_corrupt_checkpoint", "fall_back", "fail")
        for name in self.init_allow_different:
            one_of(name, "init_allow_different", *FACTS)
        check(
            bool(self.init_from) or not self.init_allow_different,
            "init_allow_different",
            f"{self.init_allow_different} would have no effect without init_from; leave it empty",
        )
        for name in ("eval_every", "eval_batches", "picture_every", "checkpoint_every"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        check(self.checkpoint_minutes >= 0, "checkpoint_minutes", "must not be negative")
