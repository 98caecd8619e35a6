"""Predicts the memory and time of a run on a TPU slice before one is rented.

    python main.py --config=configs/beit_large.py --plan=v4-128
    python main.py --config=configs/beit_base.py --plan=v4-8,v5litepod-16,v6e-8

Compiles the run's own train step (`training.state.train_step`: real task, optimizer, mesh,
shardings, donated state) ahead of time for the slice, from shapes alone. That needs no TPU, no
images and no tokenizer file, but libtpu (`pip install libtpu`), which holds the compiler. Without
libtpu only the numbers that can be counted by hand are printed.

The numbers:
- Parameters and FLOPs are counted exactly: two per multiply-add, matrix products and convolutions
  only, recomputation not counted. In pre-training the head counts on the scored patches and the
  tokenizer once forward.
- Memory is the compiler's own assignment of buffers. Segmentation evaluates whole images, which may
  take more than a step, so that program is compiled too, for photographs of 4 : 3.
- The step time is a model, not a measurement: the compiler's `estimated_cycles` of every
  instruction, over the chip's clock, and the collectives, which have no cycles, as bytes over
  links (an all-reduce moves its bytes twice; fewer links where a small slice has no wrap-around).
  Against the two published v4 runs that it can be compared with (deit3-jax, ViT-B and ViT-L) the
  cycles alone are 8 and 12 % too high; other chips were not compared, and v6e's clock is a guess.
  Input, checkpoints and evaluation are not included. Gathers, scatters and sorts have no cycles and
  are listed; so is a Pallas kernel that declares no cost.

`--plan_program` chooses the program to compile. "full" is the one that runs; compiling it unrolled
takes minutes (BEiT-B 6, BEiT-L 12 on two quiet cores). "shallow" compiles the same step with 2 and
with 4 layers (a segmenter that reads four blocks: with 4 and 6), all unrolled, and extrapolates
linearly to the model's depth. On v4 its time came within 4 % of the full program's (BEiT-B at 64
images per chip 127 for 124 ms, BEiT-L at 32: 162 for 169 ms) and its memory within 0.5 %. A rolled
scan would be no substitute: 165 ms and 1.6 times the temporary memory for BEiT-B. Where a shallow
plan is a few per cent over the memory, compile the full one: the compiler recomputes to make a
program fit.
"""

import dataclasses
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from beit_jax.config import one_of
from beit_jax.files import write_json
from beit_jax.planning import report
from beit_jax.planning.advice import advice, bound
from beit_jax.planning.ahead_of_time import (
    Compiled,
    compile_shallow,
    compile_step,
    evaluation_bytes,
    for_tpu,
    have_compiler,
)
from beit_jax.planning.estimate import (
    PUBLISHED_MFU,
    Memory,
    Plan,
    StepTime,
    memory_of_state,
    step_time,
    traffic,
)
from beit_jax.planning.slices import Slice
from beit_jax.planning.workloads import PlannedConfig, Workload, planned, workload
from beit_jax.training import sharding

PROGRAMS = ("full", "shallow")

NO_COMPILER = "libtpu is not installed"


def run(
    config: PlannedConfig, *, slices: Sequence[Slice], program: str = "full", workdir: str
) -> list[Plan]:
    """Plans the run on every slice, prints tables and writes `plan.json` into `workdir`.

    Args:
      config: of a job in `workloads.PLANNED`.
      slices: from `parse_slices`.
      program: "full" or "shallow", see the module's docstring.
      workdir: where the JSON goes.

    Raises:
      ConfigError: the config does not fit a slice, or such jobs can't be planned.
    """
    one_of(program, "--plan_program", *PROGRAMS)
    planned(config)
    # A plan is made on the CPU even where there is a TPU: of libtpu only the compiler is used.
    jax.config.update("jax_platforms", "cpu")
    for tpu_slice in slices:
        # A batch that does not divide is an error before the first compilation, not after it.
        memory_of_state(config, tpu_slice)
    compiler = have_compiler()
    if not compiler:
        logging.warning("%s: only the analytic part (pip install libtpu)", NO_COMPILER)
    plans = []
    for tpu_slice in slices:
        plans.append(make_plan(config, tpu_slice, program=program if compiler else "none"))
        print(f"\n{report.table(plans[-1])}", flush=True)
    if len(plans) > 1:
        print(f"\n{report.comparison(plans)}")
    path = epath.Path(workdir) / "plan.json"
    write_json(path, [dataclasses.asdict(plan) for plan in plans])
    print(f"\nas JSON: {path}")
    return plans


def make_plan(config: PlannedConfig, tpu_slice: Slice, *, program: str) -> Plan:
    """The plan for one slice.

    Args:
      config: the run.
      tpu_slice: the slice.
      program: "full", "shallow", or "none" for the analytic part alone.
    """
    config = for_tpu(config)
    model = config.model
    depths = [job.model.layers for job in planned(config).shallow(config)]
    if program == "none":
        compiled, described = None, f"none compiled: {NO_COMPILER}"
    elif program == "shallow" and model.layers > max(depths):
        compiled = compile_shallow(config, tpu_slice)
        shown = " and ".join(map(str, depths))
        described = f"compiled with {shown} layers, unrolled; continued to {model.layers} layers"
    else:
        compiled = compile_step(config, tpu_slice)
        rolled = model.blocks_per_step < model.layers
        unrolling = f"{model.blocks_per_step} unrolled at a time" if rolled else "all unrolled"
        described = f"the run's own, {model.layers} layers, {unrolling}"
    held_out = None if compiled is None else evaluation_bytes(config, tpu_slice)
    return assemble(config, tpu_slice, compiled=compiled, described=described, evaluation=held_out)


def assemble(
    config: PlannedConfig,
    tpu_slice: Slice,
    *,
    compiled: Compiled | None,
    described: str,
    evaluation: float | None = None,
) -> Plan:
    """Puts counts, memory, time and advice together.

    Args:
      config: the run.
      tpu_slice: where it is to run.
      compiled: the compiler's answer; None for the analytic part alone.
      described: which program that is about.
      evaluation: of `ahead_of_time.evaluation_bytes`.
    """
    work, chip = workload(config), tpu_slice.chip
    memory = _memory(config, tpu_slice, compiled=compiled, evaluation=evaluation)
    images = work.batch_size // tpu_slice.chips
    program = None if compiled is None else compiled.program
    time = None
    if compiled is not None and program is not None:
        flops = work.flops["step"] * images
        time = step_time(program, tpu_slice, flops_per_chip=flops, hbm_bytes=compiled.hbm_bytes)
    at_peak = chip.peak * tpu_slice.chips / work.flops["step"]
    slow, fast = _speed_range(work, time, at_peak=at_peak)
    total = work.steps * work.batch_size
    plan = Plan(
        slice=tpu_slice.name,
        device=chip.device_kind,
        shape=tpu_slice.shape,
        chips=tpu_slice.chips,
        hosts=tpu_slice.hosts,
        mesh={
            sharding.DATA: tpu_slice.chips // config.run.fsdp,
            sharding.FSDP: config.run.fsdp,
        },
        images_per_chip=images,
        workload=work,
        program=described,
        memory=memory,
        time=time,
        missing=NO_COMPILER if compiled is None else compiled.missing,
        collectives=() if program is None else traffic(program, tpu_slice),
        uncosted=() if program is None else program.uncosted,
        images_per_second=(slow, fast),
        mfu=None if time is None else slow / at_peak,
        days=(total / fast / 86400, total / slow / 86400),
        host_images_per_second=fast / tpu_slice.hosts,
        host_bytes_per_second=fast / tpu_slice.hosts * work.input_bytes,
        host_images_per_vcpu=fast / tpu_slice.hosts / tpu_slice.vcpus,
        bound="",
        advice=(),
    )
    return dataclasses.replace(plan, bound=bound(plan), advice=tuple(advice(plan, config)))


def _memory(
    config: PlannedConfig,
    tpu_slice: Slice,
    *,
    compiled: Compiled | None,
    evaluation: float | None,
) -> Memory:
    """The state's bytes, and the compiler's where there are any."""
    memory = memory_of_state(config, tpu_slice)
    if compiled is not None:
        memory = dataclasses.replace(
            memory,
            needed=compiled.needed,
            arguments=compiled.arguments,
            temporary=compiled.temporary,
            code=compiled.code,
        )
    if evaluation is not None:
        held = memory.parameters + memory.optimizer + memory.tokenizer
        memory = dataclasses.replace(memory, evaluation=held + evaluation)
    return memory


def _speed_range(work: Workload, time: StepTime | None, *, at_peak: float) -> tuple[float, float]:
    """Images per second on all chips; without an estimate, what published runs would make of it."""
    if time is None:
        low, high = PUBLISHED_MFU
        return low * at_peak, high * at_peak
    return work.batch_size / time.seconds, work.batch_size / time.seconds
