"""The numbers of a plan: counts, memory and traffic exactly, the step's time as a model.

`plan.py` says what the time rests on and how far it was off.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from beit_jax.config import check
from beit_jax.planning import hlo
from beit_jax.planning.slices import Slice
from beit_jax.planning.workloads import (
    PlannedConfig,
    Workload,
    array_bytes,
    batch_shapes,
    task_of_shapes,
)
from beit_jax.training import optim, sharding, state

# The two runs the cycles were compared with took 0.93 and 0.89 of the estimate; the rest of the
# range is judgement.
LIKELY = (0.85, 1.1)
# A kernel that declares its cost is taken to run at this share of its bound.
KERNEL_EFFICIENCY = 0.6
# The model FLOPs utilisation of published ViT-B and -L runs on TPUs, deit3-jax to PaliGemma: the
# range that a plan without a compiler assumes.
PUBLISHED_MFU = (0.30, 0.55)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      parameters, optimizer, tokenizer, batch: from shapes and shardings; `optimizer` is all of
        the train state but its parameters, `tokenizer` all that is not trained.
      arguments: all of them as the compiler lays them out, padding included.
      temporary: activations, gradients and whatever else lives during a step.
      code: the program itself.
      needed: everything at once.
      evaluation: everything at once while held-out images are evaluated; None where that is less.
      available: what a program may use.

    `arguments`, `temporary`, `code`, `needed` and `evaluation` are None without a compiler.
    """

    parameters: float
    optimizer: float
    tokenizer: float
    batch: float
    arguments: float | None = None
    temporary: float | None = None
    code: float | None = None
    needed: float | None = None
    evaluation: float | None = None
    available: float

    @property
    def fits(self) -> bool | None:
        """Whether everything fits; None where that is not known."""
        if self.needed is None:
            return None
        return max(self.needed, self.evaluation or 0.0) <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, and the parts they are computed from.

    Attributes:
      seconds: the estimate: cycles plus the collectives that no computation hides.
      likely: the range in which the true value is expected.
      compute_at_peak: matrix products at the chip's peak.
      cycles: the compiler's estimate, with the costs that kernels declare.
      matmul_cycles: the part of `cycles` in instructions that contain a matrix product.
      hbm: all operands and results at HBM's bandwidth. An upper bound, since some stay on the
        chip; None where the program has loops.
      collectives: all of them, one after the other.
    """

    seconds: float
    likely: tuple[float, float]
    compute_at_peak: float
    cycles: float
    matmul_cycles: float
    hbm: float | None
    collectives: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind per step: calls, whole arrays' bytes, seconds on the links."""

    kind: str
    count: float
    bytes: float
    bytes_by_dtype: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything known about a run on a slice; `--plan` prints it and writes it as JSON."""

    slice: str
    device: str
    shape: tuple[int, ...]
    chips: int
    hosts: int
    mesh: dict[str, int]
    images_per_chip: int
    workload: Workload
    program: str  # the program that the compiler's numbers are about
    memory: Memory
    time: StepTime | None
    missing: str  # why there is no time; "" where there is
    collectives: tuple[Traffic, ...]
    uncosted: tuple[hlo.Uncosted, ...]
    images_per_second: tuple[float, float]  # range; equal ends where there is an estimate
    mfu: float | None
    days: tuple[float, float]
    host_images_per_second: float
    host_bytes_per_second: float
    host_images_per_vcpu: float
    bound: str
    advice: tuple[str, ...]


def memory_of_state(config: PlannedConfig, tpu_slice: Slice) -> Memory:
    """Bytes of the train state and a batch on one chip, from shapes and sharding rules alone.

    Raises:
      ConfigError: the batch or `config.run.fsdp` does not divide over the slice.
    """
    check(
        tpu_slice.chips % config.run.fsdp == 0,
        "config.run.fsdp",
        f"{config.run.fsdp} does not divide {tpu_slice.chips} chips of {tpu_slice.name}",
    )
    # An abstract mesh has no devices, so any slice can be planned for.
    mesh = jax.sharding.AbstractMesh(
        (tpu_slice.chips // config.run.fsdp, config.run.fsdp),
        (sharding.DATA, sharding.FSDP),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    sharding.check_batch(
        config.run.batch_size,
        accumulate=config.optimizer.accumulate,
        mesh=mesh,
        processes=tpu_slice.hosts,
    )
    task = task_of_shapes(config)
    shapes = state.state_shapes(
        task, optim.adamw(config.optimizer), mesh, average=config.optimizer.ema_decay is not None
    )
    total = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(shapes))
    parameters = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(shapes.params))
    images = config.run.batch_size // tpu_slice.chips
    return Memory(
        parameters=parameters,
        optimizer=total - parameters,
        tokenizer=sum(array_bytes(leaf) for leaf in jax.tree.leaves(task.frozen)),
        batch=sum(array_bytes(leaf) for leaf in batch_shapes(config, batch_size=images).values()),
        available=tpu_slice.chip.hbm,
    )


def collective_seconds(collective: hlo.Collective, tpu_slice: Slice) -> float:
    """Seconds of one call on an otherwise idle interconnect.

    A ring all-reduce sends (n-1)/n of its bytes twice, a gather or scatter once; all links that
    the slice's shape offers are used at once.
    """
    if collective.group <= 1:
        return 0.0
    times = 2 if collective.kind == "all-reduce" else 1
    share = (collective.group - 1) / collective.group
    return times * share * collective.bytes / (tpu_slice.links * tpu_slice.chip.link)


def traffic(program: hlo.Program, tpu_slice: Slice) -> tuple[Traffic, ...]:
    """Sums the collectives by kind."""
    kinds: dict[str, Traffic] = {}
    for collective in program.collectives:
        before = kinds.get(collective.kind)
        sizes = dict(before.bytes_by_dtype) if before else {}
        for dtype, size in collective.bytes_by_dtype.items():
            sizes[dtype] = sizes.get(dtype, 0) + collective.runs * size
        seconds = collective.runs * collective_seconds(collective, tpu_slice)
        kinds[collective.kind] = Traffic(
            kind=collective.kind,
            count=collective.runs + (before.count if before else 0),
            bytes=sum(sizes.values()),
            bytes_by_dtype=sizes,
            seconds=seconds + (before.seconds if before else 0),
        )
    return tuple(kinds.values())


def step_time(
    program: hlo.Program, tpu_slice: Slice, *, flops_per_chip: float, hbm_bytes: float | None
) -> StepTime:
    """The time of a step, from what the compiled program's text says.

    Args:
      program: read from the text.
      tpu_slice: where it runs.
      flops_per_chip: of the matrix products of a step.
      hbm_bytes: operands and results of a step on one chip; None where loops hide them.
    """
    chip = tpu_slice.chip
    kernels = sum(
        max(work.flops / chip.peak, work.bytes / chip.hbm_bandwidth) / KERNEL_EFFICIENCY
        for work in program.uncosted
        if work.kernel and work.declared
    )
    cycles = program.cycles / chip.clock + kernels
    hidden = exposed = 0.0
    for collective in program.collectives:
        seconds = collective.runs * collective_seconds(collective, tpu_slice)
        if collective.overlapped:
            hidden += seconds
        else:
            exposed += seconds
    seconds = max(cycles, hidden) + exposed
    return StepTime(
        seconds=seconds,
        likely=(LIKELY[0] * seconds, LIKELY[1] * seconds),
        compute_at_peak=flops_per_chip / chip.peak,
        cycles=cycles,
        matmul_cycles=program.matmul_cycles / chip.clock,
        hbm=None if hbm_bytes is None else hbm_bytes / chip.hbm_bandwidth,
        collectives=hidden + exposed,
    )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
