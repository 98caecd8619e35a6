"""Compiles the run's own train step for a TPU slice, on a machine without a TPU.

libtpu holds the compiler; everything else is shapes: no weights, no images, no tokenizer file.

    compiled = compile_step(config, parse_slice("v4-128"))
    compiled.needed  # bytes on each chip
    compiled.program.cycles  # None for `program` where it does not fit
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding

from beit_jax import hlo
from beit_jax.config import RunError
from beit_jax.models.heads import masked_image_model
from beit_jax.slices import Slice
from beit_jax.tasks.pretrain import PretrainConfig, pretrain_task
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.training import optim, sharding, state
from beit_jax.training.state import Task, TrainState

SHALLOW_LAYERS = (2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said of one program; without `program` it did not fit."""

    needed: float
    program: hlo.Program | None = None
    arguments: float = 0.0
    temporary: float = 0.0
    code: float = 0.0
    hbm_bytes: float | None = None


def have_compiler() -> bool:
    """Whether libtpu can be found."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or (
        importlib.util.find_spec("libtpu") is not None
    )


def batch_shapes(config: PretrainConfig, *, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the host sends it (`data.pipeline.training_batches`)."""
    size, token_size, grid = (
        config.model.image_size,
        config.tokenizer.image_size,
        config.model.grid,
    )
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "token_image": jax.ShapeDtypeStruct((batch_size, token_size, token_size, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch_size, grid, grid), jnp.bool_),
    }


@functools.cache
def task_of_shapes(config: PretrainConfig) -> Task:
    """The run's task on shapes: the tokenizer's weights are not read."""
    tokenizer = open_tokenizer(config.tokenizer)
    return pretrain_task(
        masked_image_model(config.model, vocabulary=tokenizer.vocabulary),
        tokenizer,
        tokenizer_params=jax.eval_shape(tokenizer.init, jax.random.key(0)),
        config=config,
        slots=slots(config),
    )


def slots(config: PretrainConfig) -> int:
    """Masked positions that are scored per image."""
    # Here and not above: `data` imports TensorFlow.
    from beit_jax.data import masking

    return masking.max_masked(config.data.mask, grid=config.model.grid)


def compile_step(config: PretrainConfig, place: Slice) -> Compiled:
    """Compiles the train step for a slice and reads what the compiler says about it."""
    mesh = sharding.make_mesh(fsdp=config.run.fsdp, devices=devices(place))
    lowered = lower_step(config, mesh)
    layers, unroll = config.model.layers, config.model.scan_unroll
    logging.info(
        "%s: compiling the step, %d layers, %s …%s",
        place.name,
        layers,
        "rolled" if unroll < layers else "unrolled",
        " (minutes; --plan_program=shallow is quicker)" if layers >= unroll > 4 else "",
    )
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_exceeded(str(error))
        if needed is None:
            raise RunError(f"--plan: the compiler failed: {str(error).splitlines()[0]}") from error
        return Compiled(needed=needed)
    logging.info("%s: compiled in %.0f s", place.name, time.perf_counter() - began)
    program = hlo.read(compiled.as_text())
    size = compiled.memory_analysis()
    kept = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    return Compiled(
        program=program,
        needed=kept + size.temp_size_in_bytes + size.generated_code_size_in_bytes,
        arguments=kept,
        temporary=size.temp_size_in_bytes,
        code=size.generated_code_size_in_bytes,
        # Counts a loop's body once.
        hbm_bytes=None if program.loops else compiled.cost_analysis().get("bytes accessed"),
    )


def devices(place: Slice) -> list:
    """The slice's devices, described by libtpu.

    Raises:
      RunError: libtpu doesn't answer.
    """
    # No metadata server to ask, and no TPU to lock: several plans may be made at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # only so that it isn't looked for
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": place.host_bounds}
    if place.chip.config_name:
        options["chip_config_name"] = place.chip.config_name
    shape = place.shape if place.chip.axes == 3 else place.shape[:2]
    name = f"{place.chip.topology}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as error:
        raise RunError(
            f"--plan: libtpu can't describe {name}: {str(error).splitlines()[0]}"
        ) from error


def lower_step(config: PretrainConfig, mesh: Mesh) -> Any:
    """The run's train step on `mesh`, traced and lowered for TPUs, with nothing materialised."""
    task = task_of_shapes(config)
    optimizer = optim.adamw(config.optimizer)
    shapes: TrainState = state.state_shapes(task, optimizer, mesh)
    replicated = NamedSharding(mesh, sharding.REPLICATED)
    split = NamedSharding(mesh, sharding.BATCH)

    def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    frozen = jax.tree.map(functools.partial(placed, where=replicated), task.frozen)
    batch = batch_shapes(config, batch_size=config.run.batch_size)
    batch = {name: placed(leaf, split) for name, leaf in batch.items()}
    step = functools.partial(
        state.train_step,
        task=task,
        config=config.optimizer,
        optimizer=optimizer,
        schedule=optim.learning_rate(config.optimizer, steps=config.run.steps),
        seed=config.run.seed,
        mesh=mesh,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, replicated))
    return jitted.trace(shapes, frozen, batch).lower(lowering_platforms=("tpu",))


def memory_exceeded(message: str) -> float | None:
    """Bytes a program needs, from the compiler's complaint that there are too few; else None."""
    found = re.search(r"[Rr]an out of memory.*?\(?([\d.]+)([KMGT])\)? exceeds", message, re.DOTALL)
    if not found:
        found = re.search(r"Ran out of memory in memory space hbm.*?Used ([\d.]+)([KMGT])", message)
    if not found:
        return None
    return float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)]


def compile_shallow(config: PretrainConfig, place: Slice) -> Compiled:
    """Two shallow programs, and the straight line through them at the model's depth."""
    low, high = (
        compile_step(
            dataclasses.replace(
                config, model=dataclasses.replace(config.model, layers=n, scan_unroll=n)
            ),
            place,
        )
        for n in SHALLOW_LAYERS
    )
    reach = (config.model.layers - SHALLOW_LAYERS[0]) / (SHALLOW_LAYERS[1] - SHALLOW_LAYERS[0])

    def line(a: float, b: float) -> float:
        return a + reach * (b - a)

    needed = line(low.needed, high.needed)
    if low.program is None or high.program is None:
        return Compiled(needed=needed)
    names = ("arguments", "temporary", "code")
    sizes = {name: line(getattr(low, name), getattr(high, name)) for name in names}
    known = low.hbm_bytes is not None and high.hbm_bytes is not None
    return Compiled(
        needed=needed,
        program=_continue(low.program, high.program, line=line),
        hbm_bytes=line(low.hbm_bytes, high.hbm_bytes) if known else None,
        **sizes,
    )


def _continue(low: hlo.Program, high: hlo.Program, *, line) -> hlo.Program:
    """The program at full depth; collectives are summed by kind and group first."""

    def summed(program: hlo.Program) -> dict[tuple, hlo.Collective]:
        groups: dict[tuple, hlo.Collective] = {}
        for each in program.collectives:
            key = (each.kind, each.group, each.overlapped)
            before = groups.get(key)
            sizes = {d: each.runs * size for d, size in each.bytes_by_dtype.items()}
            if before:
                for dtype, size in before.bytes_by_dtype.items():
                    sizes[dtype] = sizes.get(dtype, 0) + size
            groups[key] = dataclasses.replace(
                each,
                bytes=sum(sizes.values()),
                bytes_by_dtype=sizes,
                runs=each.runs + (before.runs if before else 0),
            )
        return groups

    a, b = summed(low), summed(high)
    collectives = []
    for key in a | b:
        first, second = a.get(key), b.get(key)
        any_one = second or first
        sizes = {
            dtype: line(
                first.bytes_by_dtype.get(dtype, 0) if first else 0,
                second.bytes_by_dtype.get(dtype, 0) if second else 0,
            )
            for dtype in (first.bytes_by_dtype if first else {})
            | (second.bytes_by_dtype if second else {})
        }
        runs = max(line(first.runs if first else 0, second.runs if second else 0), 1)
        each_run = {dtype: max(size, 0) / runs for dtype, size in sizes.items()}
        collectives.append(
            dataclasses.replace(
                any_one, bytes=sum(each_run.values()), bytes_by_dtype=each_run, runs=runs
            )
        )
    by_name = {(each.name, each.declared): each for each in low.uncosted}
    uncosted = []
    for each in high.uncosted:
        before = by_name.get((each.name, each.declared))
        if before:
            each = dataclasses.replace(
                each,
                runs=line(before.runs, each.runs),
                bytes=line(before.bytes, each.bytes),
                flops=line(before.flops, each.flops),
            )
        uncosted.append(each)
    return dataclasses.replace(
        high,
        cycles=line(low.cycles, high.cycles),
        matmul_cycles=line(low.matmul_cycles, high.matmul_cycles),
        collectives=tuple(collectives),
        uncosted=tuple(uncosted),
    )
