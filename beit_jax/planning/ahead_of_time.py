"""Compiles the run's own train step for a TPU slice, on a machine without a TPU.

libtpu holds the compiler; everything else is shapes: no weights, no images, no tokenizer file.

    compiled = compile_step(config, parse_slice("v4-128"))
    compiled.needed  # bytes on one chip
    compiled.program.cycles  # `program` is None where it does not fit or cannot be read
"""

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beit_jax.config import RunError
from beit_jax.models.attention import resolve_implementation
from beit_jax.planning import hlo
from beit_jax.planning.slices import Slice
from beit_jax.planning.workloads import (
    PlannedConfig,
    array_bytes,
    batch_shapes,
    planned,
    task_of_shapes,
)
from beit_jax.training import optim, sharding, state
from beit_jax.training.state import TrainState
from beit_jax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's numbers about one program.

    Attributes:
      needed: bytes on a chip.
      missing: why there is no `program`; "" where there is one.
      program: read from its text.
      arguments, temporary, code: the parts of `needed`; None where it does not fit.
      hbm_bytes: operands and results of everything; None where loops hide it.
      flops: as the compiler counts them; None where loops hide some.
    """

    needed: float
    missing: str = ""
    program: hlo.Program | None = None
    arguments: float | None = None
    temporary: float | None = None
    code: float | None = None
    hbm_bytes: float | None = None
    flops: float | None = None


def have_compiler() -> bool:
    """Whether libtpu can be found."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or (
        importlib.util.find_spec("libtpu") is not None
    )


def for_tpu(config: PlannedConfig) -> PlannedConfig:
    """Resolves every "auto" as a TPU would, not as the machine that compiles."""
    resolved: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if getattr(section, "dtype", "") == "auto":
            resolved[field.name] = dataclasses.replace(section, dtype="bfloat16")
    model = resolved.get("model", config.model)
    chosen = resolve_implementation(
        model.attention, head_width=model.width // model.heads, platform="tpu"
    )
    resolved["model"] = dataclasses.replace(model, attention=chosen)
    return dataclasses.replace(config, **resolved)


def compile_step(config: PlannedConfig, tpu_slice: Slice) -> Compiled:
    """Compiles the train step for a slice and reads the compiler's numbers.

    Raises:
      RunError: libtpu does not answer, or the compiler fails for another reason than memory.
    """
    mesh = sharding.make_mesh(fsdp=config.run.fsdp, devices=devices(tpu_slice))
    lowered = lower_step(config, mesh)
    layers, unroll = config.model.layers, config.model.blocks_per_step
    logging.info(
        "%s: compiling the step, %d layers, %s …%s",
        tpu_slice.name,
        layers,
        "rolled" if unroll < layers else "unrolled",
        " (minutes; --plan_program=shallow is quicker)" if layers >= unroll > 4 else "",
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="beit_jax_plan_") as dump:
        try:
            compiled = compile_with_dump(lowered, dump)
        except jax.errors.JaxRuntimeError as error:
            needed = _memory_exceeded_or_raise(error)
            return Compiled(needed=needed, missing="the compiler gives none for what does not fit")
        logging.info("%s: compiled in %.0f s", tpu_slice.name, time.perf_counter() - began)
        text, missing = program_text(compiled, dump)
    program = hlo.read(text) if text else None
    size = _memory_analysis(compiled)
    kept = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    # The compiler counts a loop's body once, so only a program without loops has a total.
    countable = program is not None and not program.loops
    counted = (compiled.cost_analysis() if countable else None) or {}
    return Compiled(
        program=program,
        missing=missing,
        needed=kept + size.temp_size_in_bytes + size.generated_code_size_in_bytes,
        arguments=kept,
        temporary=size.temp_size_in_bytes,
        code=size.generated_code_size_in_bytes,
        hbm_bytes=counted.get("bytes accessed"),
        flops=counted.get("flops"),
    )


def _memory_analysis(compiled: jax.stages.Compiled) -> Any:
    size = compiled.memory_analysis()
    if size is None:
        raise RunError("--plan: this libtpu does not say how much memory the program needs")
    return size


def compile_with_dump(lowered: jax.stages.Lowered, dump: str) -> jax.stages.Compiled:
    """Compiles, and lets the compiler write its program as text into the folder `dump`."""
    try:
        return lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "xla_dump" not in str(error):
            raise
        return lowered.compile()  # a libtpu without these options


def program_text(compiled: jax.stages.Compiled, dump: str) -> tuple[str | None, str]:
    """The compiled program as text.

    `compiled.as_text()` is indirect: JAX parses libtpu's serialised program. jax 0.10.2 cannot
    parse the programs that libtpu 0.0.52 makes for chips whose gathers run on SparseCores (v5p,
    v6e). libtpu's own dump is the same text, so it comes first.

    Args:
      compiled: the executable.
      dump: the folder that the compiler wrote to.

    Returns:
      The text, and the reason where it is None.
    """
    written = []
    for path in pathlib.Path(dump).glob("*.txt"):
        text = path.read_text(errors="replace")
        # The compiler writes the program after several stages; the last one has the cycles.
        if text.startswith("HloModule") and '"estimated_cycles"' in text:
            written.append(text)
    if written:
        return max(written, key=len), ""
    try:
        return compiled.as_text(), ""
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        logging.warning("the compiled program's text can't be had: %s", reason)
        return None, f"the compiled program's text can't be had from this libtpu ({reason})"


def devices(tpu_slice: Slice) -> list[jax.Device]:
    """The slice's devices, described by libtpu.

    Raises:
      RunError: libtpu does not answer.
    """
    # There is no metadata server to ask and no TPU to lock; several plans may be made at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v4-8"
    )  # only so that libtpu does not look for one
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": tpu_slice.host_bounds}
    if tpu_slice.chip.config_name:
        options["chip_config_name"] = tpu_slice.chip.config_name
    shape = tpu_slice.shape if tpu_slice.chip.axes == 3 else tpu_slice.shape[:2]
    name = f"{tpu_slice.chip.topology}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as error:
        raise RunError(
            f"--plan: libtpu can't describe {name}: {str(error).splitlines()[0]}"
        ) from error


def lower_step(config: PlannedConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The run's train step on `mesh`, traced and lowered for TPUs, with nothing materialised."""
    task = task_of_shapes(config)
    shapes = _state_shapes(config, mesh)
    batch = batch_shapes(config, batch_size=config.run.batch_size)
    jitted = state.jitted_step(
        task,
        state=shapes,
        config=config.optimizer,
        optimizer=optim.adamw(config.optimizer),
        steps=config.run.steps,
        seed=config.run.seed,
        mesh=mesh,
    )
    frozen = _laid_out(task.frozen, mesh, sharding.REPLICATED)
    traced = jitted.trace(shapes, frozen, _laid_out(batch, mesh, sharding.BATCH))
    return traced.lower(lowering_platforms=("tpu",))


def lower_evaluation(
    config: PlannedConfig, mesh: Mesh, *, batch: dict[str, jax.ShapeDtypeStruct]
) -> jax.stages.Lowered:
    """The evaluation of a batch (`training.evaluation_pass`), as `lower_step` lowers the step."""
    task = task_of_shapes(config)
    shapes = _state_shapes(config, mesh)
    jitted = jax.jit(
        sharding.on_mesh(state.stateful_evaluate(task), mesh),
        out_shardings=NamedSharding(mesh, sharding.REPLICATED),
    )
    frozen = _laid_out(task.frozen, mesh, sharding.REPLICATED)
    batch = _laid_out(batch, mesh, sharding.BATCH)
    traced = jitted.trace(shapes.params, shapes.variables, frozen, batch)
    return traced.lower(lowering_platforms=("tpu",))


def _state_shapes(config: PlannedConfig, mesh: Mesh) -> TrainState:
    return state.state_shapes(
        task_of_shapes(config),
        optim.adamw(config.optimizer),
        mesh,
        average=config.optimizer.ema_decay is not None,
    )


def _laid_out(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    layout = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), tree
    )


def evaluation_bytes(config: PlannedConfig, tpu_slice: Slice) -> float | None:
    """Bytes on a chip that an evaluation takes beside the train state.

    Compiled with the shallower of `Planned.shallow`'s models: without a backward pass a block
    leaves nothing behind that the next one could not overwrite.

    Returns:
      None where the job's evaluation takes less than its step (`Planned.held_out`).
    """
    held_out = planned(config).held_out
    if held_out is None:
        return None
    shallow, _ = planned(config).shallow(config)
    mesh = sharding.make_mesh(fsdp=config.run.fsdp, devices=devices(tpu_slice))
    batch = held_out(config, batch_size=config.run.batch_size)
    logging.info("%s: compiling the evaluation …", tpu_slice.name)
    lowered = lower_evaluation(shallow, mesh, batch=batch)
    images = sum(map(array_bytes, batch.values())) / tpu_slice.chips
    try:
        size = _memory_analysis(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        return images + _memory_exceeded_or_raise(error)
    return images + size.temp_size_in_bytes + size.generated_code_size_in_bytes


def _memory_exceeded_or_raise(error: jax.errors.JaxRuntimeError) -> float:
    needed = memory_exceeded(str(error))
    if needed is None:
        message = str(error).splitlines()[0]
        raise RunError(f"--plan: the compiler failed: {message}") from error
    return needed


def memory_exceeded(message: str) -> float | None:
    """Bytes a program needs, from the compiler's out-of-memory message; None for other messages."""
    found = re.search(r"[Rr]an out of memory.*?\(?([\d.]+)([KMGT])\)? exceeds", message, re.DOTALL)
    if not found:
        found = re.search(r"Ran out of memory in memory space hbm.*?Used ([\d.]+)([KMGT])", message)
    if not found:
        return None
    return float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)]


def compile_shallow(config: PlannedConfig, tpu_slice: Slice) -> Compiled:
    """Compiles two shallow programs and extrapolates linearly to the model's depth."""
    shallow = planned(config).shallow(config)
    low, high = (compile_step(job, tpu_slice) for job in shallow)
    depths = [job.model.layers for job in shallow]
    reach = (config.model.layers - depths[0]) / (depths[1] - depths[0])

    def line(a: float, b: float) -> float:
        # More layers do not take less: programs differ by more than their layers, and from two
        # sizes of code a straight line can come out below zero.
        return max(a + reach * (b - a), b)

    def line_if_known(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else line(a, b)

    arguments = line_if_known(low.arguments, high.arguments)
    temporary = line_if_known(low.temporary, high.temporary)
    code = line_if_known(low.code, high.code)
    if arguments is None or temporary is None or code is None:
        arguments = temporary = code = None
        needed = line(low.needed, high.needed)
    else:
        needed = arguments + temporary + code
    sizes = Compiled(needed=needed, arguments=arguments, temporary=temporary, code=code)
    if low.program is None or high.program is None:
        return dataclasses.replace(sizes, missing=low.missing or high.missing)
    return dataclasses.replace(
        sizes,
        program=_continue(low.program, high.program, line=line),
        hbm_bytes=line_if_known(low.hbm_bytes, high.hbm_bytes),
        flops=line_if_known(low.flops, high.flops),
    )


_Line = Callable[[float, float], float]  # the value at full depth from those at two depths


def _continue(low: hlo.Program, high: hlo.Program, *, line: _Line) -> hlo.Program:
    """The program at full depth, from those at two shallow ones."""
    return dataclasses.replace(
        high,
        cycles=line(low.cycles, high.cycles),
        matmul_cycles=line(low.matmul_cycles, high.matmul_cycles),
        collectives=_continue_collectives(low, high, line=line),
        uncosted=_continue_uncosted(low, high, line=line),
    )


def _continue_collectives(
    low: hlo.Program, high: hlo.Program, *, line: _Line
) -> tuple[hlo.Collective, ...]:
    """The deeper program's collectives, scaled so that their sums fit the straight line.

    Sums are over kind and group, since the compiler may combine and overlap the two programs'
    collectives differently.
    """
    (low_runs, low_sizes), (high_runs, high_sizes) = _sums(low), _sums(high)
    collectives = []
    for collective in high.collectives:
        key = collective.kind, collective.group
        more = line(low_runs[key], high_runs[key]) / high_runs[key]
        sizes = {}
        for dtype, size in collective.bytes_by_dtype.items():
            whole = high_sizes[*key, dtype]
            larger = line(low_sizes[*key, dtype], whole) / whole if whole else 1.0
            sizes[dtype] = size * larger / more
        collectives.append(
            dataclasses.replace(
                collective,
                runs=collective.runs * more,
                bytes=sum(sizes.values()),
                bytes_by_dtype=sizes,
            )
        )
    return tuple(collectives)


def _sums(
    program: hlo.Program,
) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int, str], float]]:
    """Calls by kind and group, and bytes by kind, group and dtype."""
    runs: dict[tuple[str, int], float] = collections.defaultdict(float)
    sizes: dict[tuple[str, int, str], float] = collections.defaultdict(float)
    for collective in program.collectives:
        runs[collective.kind, collective.group] += collective.runs
        for dtype, size in collective.bytes_by_dtype.items():
            sizes[collective.kind, collective.group, dtype] += collective.runs * size
    return runs, sizes


def _continue_uncosted(
    low: hlo.Program, high: hlo.Program, *, line: _Line
) -> tuple[hlo.Uncosted, ...]:
    by_name = {(work.name, work.declared): work for work in low.uncosted}
    uncosted = []
    for work in high.uncosted:
        before = by_name.get((work.name, work.declared))
        if before:
            work = dataclasses.replace(
                work,
                runs=line(before.runs, work.runs),
                bytes=line(before.bytes, work.bytes),
                flops=line(before.flops, work.flops),
            )
        uncosted.append(work)
    return tuple(uncosted)
