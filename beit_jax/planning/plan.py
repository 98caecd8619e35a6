"""Know before renting: what a pre-training run needs and takes on a named TPU slice.

    python main.py --config=configs/beit_large.py --plan=v4-128
    python main.py --config=configs/beit_base.py --plan=v4-8,v5litepod-16,v6e-8

Compiles the run's own train step (`training.state.train_step`: real task, optimizer, mesh,
shardings, donated state) ahead of time for the slice, from shapes alone: no TPU, no images and no
tokenizer file, but libtpu (`pip install libtpu`), which holds the compiler. Without it only what
can be counted by hand is printed.

What the numbers are:
- Parameters and FLOPs are counted exactly: two per multiply-add, matrix products and convolutions
  only, head on the scored patches, tokenizer once forward, nothing twice where it is recomputed.
- Memory is the compiler's own assignment of buffers.
- The step time is a model, not a measurement: the compiler's `estimated_cycles` of every
  instruction, over the chip's clock, and the collectives, which have no cycles, as bytes over
  links (an all-reduce moves its bytes twice; fewer links where a small slice has no wrap-around).
  Against the two published v4 runs that it can be compared with (deit3-jax, ViT-B and ViT-L) the
  cycles alone are 8 and 12 % too many, the same way; other chips were not compared, and v6e's
  clock is a guess. Input, checkpoints and evaluation are not in it. Gathers, scatters and sorts
  have no cycles and are listed; so is a Pallas kernel that declares no cost.

`--plan_program` says which program is compiled. "full" is the one that runs: minutes for an
unrolled one (BEiT-B 6, BEiT-L 12 on two quiet cores). "shallow" compiles the same step with 2 and
with 4 layers, all unrolled, and continues the straight line to the model's depth. On v4 its time
came within 4 % of the full program's (BEiT-B at 64 images per chip 127 for 124 ms, BEiT-L at 32:
162 for 169 ms) and its memory within 0.5 %. A rolled scan would be no stand-in: 165 ms and 1.6
times the temporary memory for BEiT-B. Where a shallow plan is a few per cent over the memory, ask
for the full one: the compiler recomputes to make a program fit.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from beit_jax.config import check, one_of
from beit_jax.models.attention import implementation
from beit_jax.models.flops import matmul_flops
from beit_jax.models.heads import masked_image_model, mim_head_flops
from beit_jax.models.vit import encoder_flops
from beit_jax.planning import hlo
from beit_jax.planning.ahead_of_time import (
    SHALLOW_LAYERS,
    Compiled,
    batch_shapes,
    compile_shallow,
    compile_step,
    have_compiler,
    slots,
    task_of_shapes,
)
from beit_jax.planning.slices import GIB, Slice
from beit_jax.tasks.pretrain import PretrainConfig, student_flops
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.training import optim, sharding, state

PROGRAMS = ("full", "shallow")

# The two runs the cycles were compared with took 0.93 and 0.89 of the estimate; the rest of the
# range is judgement.
LIKELY = (0.85, 1.1)
# A kernel that declares its cost is taken to run at this share of its bound.
KERNEL_EFFICIENCY = 0.6
# What published ViT-B and -L runs reach on TPUs, deit3-jax to PaliGemma: the range of the analytic
# part's guess.
PUBLISHED_MFU = (0.30, 0.55)
NO_COMPILER = "libtpu is not installed"
# Decode, crop, jitter and resize in the official order: about 150 images/s of one core, and two
# vCPUs are one core.
IMAGES_PER_VCPU = 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What can be counted without a compiler.

    Attributes:
      parameters: trained, by part, and the tokenizer's that stay on the chips.
      flops: per image: "encoder" and "head" forward, "student" (both, forward and backward),
        "tokenizer" forward, "step" (student and tokenizer).
      input_bytes: of one image as the host sends it.
      batch_size: global.
      micro_batches: per step.
      steps: of the recipe.
    """

    parameters: dict[str, int]
    flops: dict[str, float]
    input_bytes: int
    batch_size: int
    micro_batches: int
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      parameters, optimizer, tokenizer, batch: from shapes and shardings.
      arguments: all of them as the compiler lays them out, padding included.
      temporary: activations, gradients and what else lives during a step; None without compiler.
      code: the program.
      needed: everything at once.
      available: what a program may use.
    """

    parameters: float
    optimizer: float
    tokenizer: float
    batch: float
    arguments: float | None = None
    temporary: float | None = None
    code: float | None = None
    needed: float | None = None
    available: float

    @property
    def fits(self) -> bool | None:
        """None where it isn't known."""
        return None if self.needed is None else self.needed <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step and what they rest on.

    Attributes:
      seconds: the estimate: cycles plus collectives that nothing hides.
      likely: the range it is believed to be in.
      compute_at_peak: matrix products at the chip's peak.
      cycles: by the compiler's estimate (with kernels' declared costs).
      matmul_cycles: the part of it in instructions that hold a matrix product.
      hbm: all operands and results at HBM's bandwidth, an upper bound since some stay on the chip;
        None where loops hide it.
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
    program: str  # which program the compiler's numbers are of
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


def run(config: Any, *, slices: list[Slice], program: str = "full", workdir: str) -> list[Plan]:
    """Plans the run on every slice, prints tables and writes `plan.json` into `workdir`.

    Args:
      config: a pre-training config.
      slices: from `parse_slices`.
      program: "full" or "shallow", see the module's docstring.
      workdir: where the JSON goes.

    Raises:
      ConfigError: the config does not fit a slice, or is not one of a pre-training run.
    """
    one_of(program, "--plan_program", *PROGRAMS)
    check(
        isinstance(config, PretrainConfig),
        "--plan",
        "only pre-training runs can be planned (config.task = 'pretrain')",
    )
    # A plan is made on the CPU, also where there is a TPU: libtpu is here for its compiler.
    jax.config.update("jax_platforms", "cpu")
    for each in slices:
        memory_of_state(config, each)  # what doesn't divide is known before anything is compiled
    compiler = have_compiler()
    if not compiler:
        logging.warning("%s: only the analytic part (pip install libtpu)", NO_COMPILER)
    plans = []
    for each in slices:
        plans.append(make_plan(config, each, program=program if compiler else "none"))
        print(f"\n{table(plans[-1])}", flush=True)
    if len(plans) > 1:
        print(f"\n{comparison(plans)}")
    path = epath.Path(workdir) / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2) + "\n")
    print(f"\nas JSON: {path}")
    return plans


def make_plan(config: PretrainConfig, place: Slice, *, program: str) -> Plan:
    """The plan for one slice.

    Args:
      config: the run.
      place: the slice.
      program: "full", "shallow", or "none" for the analytic part alone.
    """
    config = for_tpu(config)
    model = config.model
    if program == "none":
        compiled, described = None, f"none compiled: {NO_COMPILER}"
    elif program == "shallow" and model.layers > max(SHALLOW_LAYERS):
        compiled = compile_shallow(config, place)
        shown = " and ".join(map(str, SHALLOW_LAYERS))
        described = f"compiled with {shown} layers, unrolled; continued to {model.layers} layers"
    else:
        compiled = compile_step(config, place)
        rolled = model.scan_unroll < model.layers
        how = f"{model.scan_unroll} unrolled at a time" if rolled else "all unrolled"
        described = f"the run's own, {model.layers} layers, {how}"
    return assemble(config, place, compiled=compiled, described=described)


def for_tpu(config: PretrainConfig) -> PretrainConfig:
    """The config with "auto" resolved as on a TPU, not as on the machine that makes the plan."""
    parts = {
        name: dataclasses.replace(part, dtype="bfloat16")
        for name, part in (("model", config.model), ("tokenizer", config.tokenizer))
        if part.dtype == "auto"
    }
    model = parts.get("model", config.model)
    way = implementation(model.attention, head_width=model.width // model.heads, platform="tpu")
    parts["model"] = dataclasses.replace(model, attention=way)
    return dataclasses.replace(config, **parts)


@functools.cache
def workload(config: PretrainConfig) -> Workload:
    """Parameters, FLOPs and input bytes."""
    scored = slots(config)
    tokenizer = open_tokenizer(config.tokenizer)
    model = masked_image_model(config.model, vocabulary=tokenizer.vocabulary)
    shapes = model.shapes()
    whole_tokenizer = jax.eval_shape(tokenizer.init, jax.random.key(0))
    size = tokenizer.image_size
    naming = matmul_flops(
        tokenizer.encode, whole_tokenizer, jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    )
    encoder = encoder_flops(config.model)
    head = mim_head_flops(config.model, vocabulary=tokenizer.vocabulary, slots=scored)
    student = student_flops(config.model, vocabulary=tokenizer.vocabulary, slots=scored)
    return Workload(
        parameters={
            "encoder": _count(shapes["encoder"]),
            "head": _count(shapes["lm_head"]),
            "tokenizer": _count(tokenizer.encoding_params(whole_tokenizer)),
        },
        flops={
            "encoder": encoder,
            "head": head,
            "student": student,
            "tokenizer": naming,
            "step": student + naming,
        },
        input_bytes=sum(_bytes(leaf) for leaf in batch_shapes(config, batch_size=1).values()),
        batch_size=config.run.batch_size,
        micro_batches=config.optimizer.accumulate,
        steps=config.run.steps,
    )


def memory_of_state(config: PretrainConfig, place: Slice) -> Memory:
    """What the shapes and the sharding rules say; nothing is compiled."""
    check(
        place.chips % config.run.fsdp == 0,
        "config.run.fsdp",
        f"{config.run.fsdp} does not divide {place.chips} chips of {place.name}",
    )
    # The rules need a mesh, an abstract one has no devices: any slice can be asked about.
    mesh = jax.sharding.AbstractMesh(
        (place.chips // config.run.fsdp, config.run.fsdp),
        (sharding.DATA, sharding.FSDP),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    sharding.check_batch(
        config.run.batch_size,
        accumulate=config.optimizer.accumulate,
        mesh=_Sized(mesh),
        processes=place.hosts,
    )
    task = task_of_shapes(config)
    shapes = state.state_shapes(
        task, optim.adamw(config.optimizer), mesh, average=config.optimizer.ema_decay is not None
    )
    per_chip = functools.partial(jax.tree.map, _shard_bytes)
    total = sum(jax.tree.leaves(per_chip(shapes)))
    parameters = sum(jax.tree.leaves(per_chip(shapes.params)))
    images = config.run.batch_size // place.chips
    return Memory(
        parameters=parameters,
        optimizer=total - parameters,
        tokenizer=sum(_bytes(leaf) for leaf in jax.tree.leaves(task.frozen)),
        batch=sum(_bytes(leaf) for leaf in batch_shapes(config, batch_size=images).values()),
        available=place.chip.hbm,
    )


def collective_seconds(each: hlo.Collective, place: Slice) -> float:
    """Time of one call on the interconnect, if nothing else is on it.

    A ring all-reduce sends (n-1)/n of its bytes twice, a gather or scatter once; all links that
    the slice's shape offers are used at once.
    """
    if each.group <= 1:
        return 0.0
    times = 2 if each.kind == "all-reduce" else 1
    share = (each.group - 1) / each.group
    return times * share * each.bytes / (place.links * place.chip.link)


def traffic(program: hlo.Program, place: Slice) -> tuple[Traffic, ...]:
    """The collectives, summed by kind."""
    kinds: dict[str, Traffic] = {}
    for each in program.collectives:
        before = kinds.get(each.kind)
        sizes = dict(before.bytes_by_dtype) if before else {}
        for dtype, size in each.bytes_by_dtype.items():
            sizes[dtype] = sizes.get(dtype, 0) + each.runs * size
        kinds[each.kind] = Traffic(
            kind=each.kind,
            count=each.runs + (before.count if before else 0),
            bytes=sum(sizes.values()),
            bytes_by_dtype=sizes,
            seconds=each.runs * collective_seconds(each, place) + (before.seconds if before else 0),
        )
    return tuple(kinds.values())


def step_time(
    program: hlo.Program, place: Slice, *, flops_per_chip: float, hbm_bytes: float | None
) -> StepTime:
    """Seconds of a step from what the compiled program's text says."""
    chip = place.chip
    kernels = sum(
        max(each.flops / chip.peak, each.bytes / chip.hbm_bandwidth) / KERNEL_EFFICIENCY
        for each in program.uncosted
        if each.kernel and each.declared
    )
    cycles = program.cycles / chip.clock + kernels
    hidden = shown = 0.0
    for each in program.collectives:
        seconds = each.runs * collective_seconds(each, place)
        if each.overlapped:
            hidden += seconds
        else:
            shown += seconds
    seconds = max(cycles, hidden) + shown
    return StepTime(
        seconds=seconds,
        likely=(LIKELY[0] * seconds, LIKELY[1] * seconds),
        compute_at_peak=flops_per_chip / chip.peak,
        cycles=cycles,
        matmul_cycles=program.matmul_cycles / chip.clock,
        hbm=None if hbm_bytes is None else hbm_bytes / chip.hbm_bandwidth,
        collectives=hidden + shown,
    )


def assemble(
    config: PretrainConfig, place: Slice, *, compiled: Compiled | None, described: str
) -> Plan:
    """Puts counts, memory, time and advice together.

    Args:
      config: the run.
      place: the slice.
      compiled: what the compiler said; None for the analytic part alone.
      described: which program that is about.
    """
    work, parts = workload(config), memory_of_state(config, place)
    chip = place.chip
    images = work.batch_size // place.chips
    estimate = None
    if compiled is not None:
        parts = dataclasses.replace(
            parts,
            needed=compiled.needed,
            arguments=compiled.arguments,
            temporary=compiled.temporary,
            code=compiled.code,
        )
        if compiled.program is not None:
            estimate = step_time(
                compiled.program,
                place,
                flops_per_chip=work.flops["step"] * images,
                hbm_bytes=compiled.hbm_bytes,
            )
    at_peak = chip.peak * place.chips / work.flops["step"]
    if estimate is None:
        speed = (PUBLISHED_MFU[0] * at_peak, PUBLISHED_MFU[1] * at_peak)
    else:
        speed = (work.batch_size / estimate.seconds,) * 2
    fastest = speed[1]
    plan = Plan(
        slice=place.name,
        device=chip.device_kind,
        shape=place.shape,
        chips=place.chips,
        hosts=place.hosts,
        mesh={
            sharding.DATA: place.chips // config.run.fsdp,
            sharding.FSDP: config.run.fsdp,
        },
        images_per_chip=images,
        workload=work,
        program=described,
        memory=parts,
        time=estimate,
        missing=NO_COMPILER if compiled is None else compiled.missing,
        collectives=() if estimate is None else traffic(compiled.program, place),
        uncosted=() if estimate is None else compiled.program.uncosted,
        images_per_second=speed,
        mfu=None if estimate is None else speed[0] / at_peak,
        days=tuple(work.steps * work.batch_size / each / 86400 for each in reversed(speed)),
        host_images_per_second=fastest / place.hosts,
        host_bytes_per_second=fastest / place.hosts * work.input_bytes,
        host_images_per_vcpu=fastest / place.hosts / place.vcpus,
        bound="",
        advice=(),
    )
    return dataclasses.replace(plan, bound=_bound(plan), advice=tuple(_advice(plan, config)))


def _bound(plan: Plan) -> str:
    """What limits the step, in words."""
    if plan.memory.fits is False:
        return "memory: it does not fit"
    if plan.time is None:
        return f"unknown: {plan.missing}"
    if plan.host_images_per_vcpu > IMAGES_PER_VCPU:
        return "the hosts' input"
    t = plan.time
    if t.collectives > 0.3 * t.seconds:
        return "collectives"
    if t.compute_at_peak > 0.6 * t.seconds:
        return "matrix units"
    if t.matmul_cycles > 0.75 * t.seconds:
        return "matrix products below peak: padding, memory, and the work fused to them"
    return "memory traffic and vector work around the matrix products"


def _advice(plan: Plan, config: PretrainConfig) -> list[str]:
    """What to change, where it does not fit or wastes the chips."""
    memory, images = plan.memory, plan.images_per_chip
    model, micro = config.model, config.optimizer.accumulate
    held = memory.parameters + memory.optimizer
    fixed = held + memory.tokenizer + memory.batch
    advice = []
    if memory.needed is None and fixed > 0.9 * memory.available:
        advice.append(_shard_state(plan))
    elif memory.fits is False:
        over = memory.needed - memory.available
        advice.append(
            f"does not fit: {_gib(memory.needed)} needed, {_gib(memory.available)} there,"
            f" {_gib(over)} too much"
        )
        # Activations go with the images at work at once; gradients and the rest are in `fixed`.
        working = memory.needed - fixed - memory.parameters
        room = memory.available - fixed - memory.parameters
        times = next(
            (
                k
                for k in (2, 4, 8, 16, 32, 64, 128)
                if images % (micro * k) == 0 and working / k <= 0.95 * room
            ),
            None,
        )
        if room > 0 and times:
            advice.append(
                f"config.optimizer.accumulate = {micro * times}: {images // micro // times} images"
                " per chip at a time, the same batch and updates"
            )
            advice.append(
                f"or {times} times the chips; or config.run.batch_size ="
                f" {plan.workload.batch_size // times} (another recipe)"
            )
        if model.remat == "none":
            advice.append("config.model.remat = 'dots' or 'full': less memory, 10 to 33 % slower")
        if model.scan_unroll < model.layers:
            advice.append(
                f"config.model.scan_unroll = {model.layers}: a rolled scan takes up to 1.8 times"
                " the memory"
            )
        if held > 0.25 * memory.available:
            advice.append(_shard_state(plan))
    elif memory.fits and memory.needed < 0.3 * memory.available:
        advice.append(
            f"{memory.needed / memory.available:.0%} of the memory is used: a smaller slice would"
            " do, or a larger batch"
        )
    if config.run.fsdp > 1 and held * config.run.fsdp < 0.25 * memory.available:
        advice.append(
            f"config.run.fsdp = 1 would fit too, the state is {_gib(held * config.run.fsdp)} whole:"
            " plan both; gathers cost time, a sharded optimizer saves some"
        )
    if plan.host_images_per_vcpu > IMAGES_PER_VCPU:
        advice.append(
            f"input-bound: {plan.host_images_per_vcpu:.0f} images/s of each vCPU; about"
            f" {IMAGES_PER_VCPU} is what one decodes and crops: expect"
            f" {IMAGES_PER_VCPU / plan.host_images_per_vcpu:.0%} of this speed"
        )
    if plan.time is not None:
        if plan.time.collectives > 0.2 * plan.time.seconds:
            advice.append(
                f"{plan.time.collectives / plan.time.seconds:.0%} of the step is collectives: more"
                " images per chip, or fewer chips"
            )
        missing = [each.name for each in plan.uncosted if each.kernel and not each.declared]
        if missing:
            advice.append(
                f"kernels without a cost, so that the time is too short: {', '.join(missing)}"
            )
    return advice


def _shard_state(plan: Plan) -> str:
    held = plan.memory.parameters + plan.memory.optimizer
    return (
        f"parameters and optimizer take {_gib(held)} per chip: config.run.fsdp ="
        f" {min(plan.chips, 8 * plan.mesh[sharding.FSDP])} splits them"
    )


def table(plan: Plan) -> str:
    """The plan of one slice, for people."""
    work, memory, t = plan.workload, plan.memory, plan.time
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    count, flops = work.parameters, work.flops
    trained = count["encoder"] + count["head"]
    rows: list[tuple[str, str, str]] = [
        (
            "slice",
            plan.slice,
            f"{plan.chips} × {plan.device}, {'×'.join(map(str, plan.shape))},"
            f" {plan.hosts} host{'s' if plan.hosts > 1 else ''}, mesh {mesh}",
        ),
        (
            "batch",
            f"{work.batch_size}",
            f"{plan.images_per_chip} per chip"
            + (f" in {work.micro_batches} parts" if work.micro_batches > 1 else ""),
        ),
        ("program", "", plan.program),
        (
            "parameters",
            f"{trained / 1e6:.2f} M",
            f"encoder {count['encoder']:,}, head {count['head']:,}; tokenizer"
            f" {count['tokenizer']:,}, frozen",
        ),
        (
            "FLOPs per image",
            f"{flops['step'] / 1e9:.2f} G",
            f"student {flops['student'] / 1e9:.2f} (forward: encoder {flops['encoder'] / 1e9:.2f},"
            f" head {flops['head'] / 1e9:.2f}; backward twice that), tokenizer"
            f" {flops['tokenizer'] / 1e9:.2f}",
        ),
        ("memory per chip", "", ""),
        ("  parameters", _gib(memory.parameters), "float32"),
        ("  optimizer", _gib(memory.optimizer), "Adam's moments, float32"),
        ("  tokenizer", _gib(memory.tokenizer), "float32"),
        ("  batch", _gib(memory.batch), f"uint8, {work.input_bytes / 1e3:.0f} kB an image"),
    ]
    if memory.temporary is not None:
        padding = memory.arguments - (
            memory.parameters + memory.optimizer + memory.tokenizer + memory.batch
        )
        rows += [
            ("  padding", _gib(padding), "of these, as the compiler lays them out"),
            ("  temporary", _gib(memory.temporary), "activations, gradients, the rest of a step"),
            ("  program", _gib(memory.code), ""),
        ]
    if memory.needed is None:
        rows.append(
            ("  temporary", "unknown", f"without the compiler; of {_gib(memory.available)}")
        )
    else:
        verdict = "fits" if memory.fits else "DOES NOT FIT"
        rows.append(
            (
                "  all",
                _gib(memory.needed),
                f"of {_gib(memory.available)} ({memory.needed / memory.available:.0%}): {verdict}",
            )
        )
    if t is None:
        low, high = PUBLISHED_MFU
        rows += [
            ("step", "unknown", f"no cycles, no collectives: {plan.missing}"),
            (
                "images/s",
                f"{_short(plan.images_per_second[0])}–{_short(plan.images_per_second[1])}",
                f"not estimated: {low:.0%} to {high:.0%} of peak, as published ViT runs",
            ),
        ]
    else:
        low, high = t.likely
        rows += [
            (
                "step",
                _ms(t.seconds),
                f"estimate, likely {_ms(low)} to {_ms(high)}: the compiler's cycles + collectives"
                " not hidden",
            ),
            ("  compute at peak", _ms(t.compute_at_peak), "matrix products alone"),
            (
                "  cycles",
                _ms(t.cycles),
                f"compiler's estimate; {_ms(t.matmul_cycles)} in matrix products and what is"
                " fused to them",
            ),
            (
                "  HBM",
                "unknown" if t.hbm is None else _ms(t.hbm),
                "the compiler counts a loop's body once"
                if t.hbm is None
                else "at most: all operands and results, on-chip ones too, at full bandwidth",
            ),
            ("  collectives", _ms(t.collectives), _collectives(plan)),
        ]
        sizable = [each for each in plan.uncosted if each.bytes > 1e6 or each.kernel]
        if sizable:
            rows.append(
                (
                    "  uncosted",
                    f"{sum(each.bytes for each in sizable) / 1e6:.0f} MB",
                    "no cycles from the compiler: "
                    + ", ".join(
                        f"{each.name} {each.runs:.0f} ×" + (" (declared)" * each.declared)
                        for each in sizable
                    ),
                )
            )
        rows += [
            ("bound", "", plan.bound),
            (
                "images/s",
                _short(plan.images_per_second[0]),
                f"{plan.images_per_second[0] / plan.chips:.0f} per chip, MFU {plan.mfu:.1%}",
            ),
        ]
    days = "–".join(dict.fromkeys(f"{day:.2f}" for day in plan.days))
    rows += [
        (
            "days",
            days,
            f"for {work.steps:,} steps, {plan.chips * plan.days[1] * 24:,.0f} chip-hours",
        ),
        (
            "input per host",
            f"{_short(plan.host_images_per_second)}/s",
            f"images; {plan.host_bytes_per_second / 1e6:.0f} MB/s to the chips,"
            f" {plan.host_images_per_vcpu:.1f} images/s of each vCPU",
        ),
    ]
    rows += [("advice" if not i else "", "", line) for i, line in enumerate(plan.advice)]
    lines = [f"{a:<17}{b:>13}  {c}".rstrip() for a, b, c in rows]
    lines.append("A model, not a measurement: see beit_jax/planning/plan.py for method and error.")
    return "\n".join(lines)


def comparison(plans: list[Plan]) -> str:
    """One line for each slice."""
    head = ["slice", "chips", "hosts", "batch", "memory", "of", "step", "images/s", "MFU", "days"]
    head += ["chip-hours", "input/host", "bound"]
    rows = [tuple(head)]
    for plan in plans:
        memory, t = plan.memory, plan.time
        rows.append(
            (
                plan.slice,
                f"{plan.chips}",
                f"{plan.hosts}",
                f"{plan.images_per_chip}/chip",
                "?" if memory.needed is None else _gib(memory.needed),
                _gib(memory.available),
                "?" if t is None else _ms(t.seconds),
                "–".join(dict.fromkeys(_short(each) for each in plan.images_per_second)),
                "?" if plan.mfu is None else f"{plan.mfu:.1%}",
                "–".join(dict.fromkeys(f"{day:.1f}" for day in plan.days)),
                f"{plan.chips * plan.days[1] * 24:,.0f}",
                f"{_short(plan.host_images_per_second)}/s",
                plan.bound,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _collectives(plan: Plan) -> str:
    if not plan.collectives:
        return "none"
    return "; ".join(
        f"{each.kind} {each.count:.0f} ×, {each.bytes / 1e6:.1f} MB ("
        + ", ".join(f"{d} {size / 1e6:.1f}" for d, size in each.bytes_by_dtype.items())
        + ")"
        for each in plan.collectives
    )


@dataclasses.dataclass(frozen=True)
class _Sized:
    """An abstract mesh as `sharding.check_batch` wants it: something with devices in a shape."""

    mesh: jax.sharding.AbstractMesh

    @property
    def devices(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(self.mesh.shape.values()), jnp.int32)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size > 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _short(number: float) -> str:
    return f"{number:,.0f}"
