"""How the training step's cost grows: with batch, image size, depth, devices and processes.

    python bench/scaling.py [--parts=sizes,devices,processes] [--json=FILE]
    python bench/scaling.py --tpu [--models=base,large] [--slices=v4-8,v4-128,v4-1024] [--json=FILE]

On a CPU it measures a small model with a small discrete VAE and the whole step as a run compiles
it. It compares the processor time of all threads and processes on one core, so that simulated
devices count with their work and not with their waiting. One core gains nothing from more devices:
the best possible result is the same time per image. Collectives are read from the compiled program.

`--tpu` is weak scaling without a TPU: the recipes' own step, compiled for slices by libtpu's
compiler at a fixed batch per chip, from two shallow programs (`ahead_of_time.compile_shallow`).
Cycles, FLOPs, memory and collectives are the compiler's; the exposed communication follows
`estimate.step_time`'s formula.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from machine import pretraining_task, processor_name, save  # beside this file

from beit_jax.text_table import text_table

BATCH, IMAGE, LAYERS = 8, 96, 4  # where nothing else is said
BATCHES = (2, 4, 8, 16)
IMAGES = (64, 96, 128, 192)
DEPTHS = (2, 4, 8, 16)
COUNTS = (1, 2, 4, 8)  # devices
PROCESSES = (1, 2, 4)
GLOBAL_BATCH, DEVICE_BATCH = 16, 4
WARM_UP = 2  # steps that don't count
TPU_IMAGES = {"base": 128, "large": 64}  # on a chip
BASE = {"batch": BATCH, "image": IMAGE, "layers": LAYERS}


def main() -> None:
    """Measures, prints tables and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="sizes,devices,processes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per row, in turn")
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--models", default="base,large", help="with --tpu")
    parser.add_argument("--slices", default="v4-8,v4-128,v4-1024", help="with --tpu")
    parser.add_argument("--json", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        print(json.dumps(worker(**json.loads(flags.worker))))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # also with --tpu: libtpu is there for its compiler
    if flags.tpu:
        tables = weak_scaling(models=flags.models.split(","), slices=flags.slices.split(","))
    else:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        parts = {"sizes": sizes, "devices": devices, "processes": processes}
        tables = {name: parts[name](flags.steps) for name in flags.parts.split(",")}
    import jax

    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": "TPU, by libtpu's compiler" if flags.tpu else processor_name(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__} | _libtpu(),
        "clock": "compiler's estimate" if flags.tpu else "processor seconds, one core",
        "steps": None if flags.tpu else flags.steps,
        **tables,
    }
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"\n{result['device']}; {versions}; {result['clock']}")
    for name, rows in tables.items():
        print(f"\n{name}\n{table(rows)}")
    save(result, flags.json)


def _libtpu() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"libtpu": importlib.metadata.version("libtpu")}
    except importlib.metadata.PackageNotFoundError:
        return {}


# ---------------------------------------------------------------------------- a step to measure


def small_config(*, batch: int, image: int, layers: int, fsdp: int = 1) -> Any:
    """A pre-training run of DeiT-tiny's width, with a discrete VAE that is small beside it."""
    from beit_jax import jobs
    from configs import beit_base

    values = beit_base.get_config()
    values.run.batch_size, values.run.fsdp = batch, fsdp
    values.model.update(
        layers=layers, width=192, heads=3, mlp_width=768, image_size=image, scan_unroll=1
    )
    tokens = (image // values.model.patch_size) ** 2
    values.tokenizer.update(
        kind="dvae", path="", random_weights=True, vocabulary=1024, width=16, levels=2
    )
    values.tokenizer.update(image_size=image // 4, codebook_width=16)
    values.data.update(image_size=image, token_image_size=image // 4)
    values.data.mask.update(count=round(0.4 * tokens), min_block=min(16, tokens // 4))
    return jobs.parse_job(values.to_dict())


@dataclasses.dataclass
class Step:
    """A compiled training step with what it is fed.

    Attributes:
      run: makes a step and waits for it.
      text: the compiled program.
      flops: of a step, analytic: matrix products, forward and backward.
      parameters: trained.
    """

    run: Callable[[], None]
    text: str
    flops: float
    parameters: int


def build(config: Any) -> Step:
    """The run's own step on all devices of all processes, with random images."""
    import functools

    import jax
    import numpy as np

    from beit_jax.planning.workloads import batch_shapes
    from beit_jax.training import optim, sharding, state

    mesh = sharding.make_mesh(fsdp=config.run.fsdp)
    task = pretraining_task(config)
    optimizer = optim.adamw(config.optimizer)
    shapes = state.state_shapes(task, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = functools.partial(state.init_state, task, optimizer)
    train_state = jax.jit(fresh, out_shardings=shardings)(jax.random.key(0))
    frozen = sharding.replicate(task.frozen, mesh)
    rng = np.random.default_rng(jax.process_index())
    local = config.run.batch_size // jax.process_count()
    made = {
        name: rng.integers(0, 256, shape.shape).astype(shape.dtype)
        for name, shape in batch_shapes(config, batch_size=local).items()
    }
    hidden = np.zeros(config.model.tokens, bool)
    hidden[: config.data.mask.count] = True
    made["mask"] = rng.permuted(np.tile(hidden, (local, 1)), axis=1).reshape(made["mask"].shape)
    batch = sharding.to_devices(made, mesh)
    jitted = state.jitted_step(
        task,
        state=train_state,
        config=config.optimizer,
        optimizer=optimizer,
        steps=config.run.steps,
        seed=0,
        mesh=mesh,
    )
    compiled = jitted.lower(train_state, frozen, batch).compile()
    held = [train_state]

    def run() -> None:
        held[0], metrics = compiled(held[0], frozen, batch)
        jax.block_until_ready((held[0].params, metrics))

    return Step(
        run=run,
        text=compiled.as_text(),
        flops=task.flops_per_image * config.run.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
    )


def processor_seconds(step: Step) -> float:
    """Of one step, all threads of this process."""
    began = time.process_time()
    step.run()
    return time.process_time() - began


# ---------------------------------------------------------------------------- on the CPU


def sizes(steps: int) -> list[dict[str, Any]]:
    """One device: the step's time against batch, image size and depth, and against FLOPs."""
    points = [
        {"vary": name, **BASE, name: value}
        for name, values in (("batch", BATCHES), ("image", IMAGES), ("layers", DEPTHS))
        for value in values
    ]
    built: dict[tuple, Step] = {}
    keys = [tuple(point[name] for name in BASE) for point in points]
    for key in keys:
        if key not in built:
            built[key] = build(small_config(**dict(zip(BASE, key, strict=True))))
    times: dict[tuple, list[float]] = {key: [] for key in built}
    for turn in range(WARM_UP + steps):
        for key, step in built.items():  # in turn, so that all see the same machine
            seconds = processor_seconds(step)
            if turn >= WARM_UP:
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return growth(
        [
            point
            | {
                "tokens": (point["image"] // 16) ** 2 + 1,
                "gflops": built[key].flops / 1e9,
                "seconds": medians[key],
            }
            for point, key in zip(points, keys, strict=True)
        ]
    )


def growth(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds time and FLOPs as multiples of the smallest row's of the same kind."""
    result, first = [], {}
    for row in rows:
        start = first.setdefault(row["vary"], row)
        times, flops = (row[name] / start[name] for name in ("seconds", "gflops"))
        result.append(row | {"times": times, "flops_times": flops, "ratio": times / flops})
    return result


def devices(steps: int) -> list[dict[str, Any]]:
    """Simulated devices of one process, at a fixed batch in all and at a fixed one on each."""
    rows = []
    for what, batch_of in (
        ("batch 16 in all", lambda count: GLOBAL_BATCH),
        ("batch 4 on each", lambda count: DEVICE_BATCH * count),
        ("batch 16, fsdp", lambda count: GLOBAL_BATCH),
    ):
        for count in COUNTS:
            fsdp = count if what.endswith("fsdp") else 1
            asked = {"batch": batch_of(count), "fsdp": fsdp, "steps": steps}
            (answer,) = start_workers([asked], devices=count)
            rows.append({"what": what, "devices": count, **_per_image([answer], asked["batch"])})
    return against_first(rows)


def processes(steps: int) -> list[dict[str, Any]]:
    """Processes with a device each, `jax.distributed` over gloo, at a fixed batch in all."""
    rows = []
    for count in PROCESSES:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        asked = [
            {"batch": GLOBAL_BATCH, "steps": steps, "process": [address, count, index]}
            for index in range(count)
        ]
        answers = start_workers(asked, devices=1)
        rows.append(
            {"what": "batch 16 in all", "processes": count, **_per_image(answers, GLOBAL_BATCH)}
        )
    return against_first(rows)


def start_workers(asked: list[dict[str, Any]], *, devices: int) -> list[dict[str, Any]]:
    """Runs `worker` in processes of their own, all at the same time; their answers."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, f"--worker={json.dumps(settings)}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for settings in asked
    ]
    try:
        said = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    for process in started:
        if process.returncode:
            raise RuntimeError(f"a worker ended with code {process.returncode}")
    return [json.loads(text.splitlines()[-1]) for text in said]


def worker(
    *, batch: int, steps: int, fsdp: int = 1, process: tuple[str, int, int] | None = None
) -> dict[str, Any]:
    """One process: its processor seconds of every step, and the program's collectives."""
    import jax

    if process is not None and process[1] > 1:
        address, count, index = process
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)
    step = build(small_config(batch=batch, image=IMAGE, layers=LAYERS, fsdp=fsdp))
    seconds = [processor_seconds(step) for _ in range(WARM_UP + steps)][WARM_UP:]
    answer = {
        "seconds": seconds,
        "collectives": collectives(step.text),
        "gradient_bytes": 4 * step.parameters,
    }
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    return answer


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Calls and bytes of each kind of collective in a compiled program; arrays counted whole."""
    from beit_jax.planning import hlo

    found: dict[str, dict[str, float]] = {}
    for collective in hlo.read(text).collectives:
        kind = found.setdefault(collective.kind, {"calls": 0.0, "bytes": 0.0})
        kind["calls"] += collective.runs
        kind["bytes"] += collective.runs * collective.bytes
    return found


def _per_image(answers: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """What processes took together, for each image; steps are matched by number."""
    steps = [sum(step) for step in zip(*(answer["seconds"] for answer in answers), strict=True)]
    found = answers[0]["collectives"]
    return {
        "batch": batch,
        "ms_per_image": 1e3 * statistics.median(steps) / batch,
        "collectives": found,
        "bytes_per_gradient_byte": sum(kind["bytes"] for kind in found.values())
        / answers[0]["gradient_bytes"],
    }


def against_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the time per image as a multiple of the first row's of the same kind."""
    first: dict[str, float] = {}
    return [
        row | {"times": row["ms_per_image"] / first.setdefault(row["what"], row["ms_per_image"])}
        for row in rows
    ]


# ---------------------------------------------------------------------------- on TPU slices


def weak_scaling(
    *,
    models: list[str],
    slices: list[str],
    compile_program: Callable[[Any, Any], Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by model: one slice after the other, the batch growing with the chips.

    Args:
      models: "base", "large".
      slices: Google's names, the smallest first.
      compile_program: (config, slice) → `ahead_of_time.Compiled`; None: `compile_shallow`.
    """
    from beit_jax import jobs
    from beit_jax.planning import ahead_of_time
    from beit_jax.planning.slices import parse_slice

    compile_program = compile_program or ahead_of_time.compile_shallow
    tables = {}
    for model in models:
        rows = []
        for name in slices:
            tpu_slice = parse_slice(name)
            values = importlib.import_module(f"configs.beit_{model}").get_config()
            values.run.batch_size = TPU_IMAGES[model] * tpu_slice.chips
            config = ahead_of_time.for_tpu(jobs.parse_job(values.to_dict()))
            row = weak_row(config, tpu_slice, compile_program(config, tpu_slice))
            print(f"{model} {json.dumps(row)}", file=sys.stderr, flush=True)
            rows.append(row)
        tables[f"BEiT-{model}, {TPU_IMAGES[model]} images a chip"] = per_chip_growth(rows)
    return tables


def weak_row(config: Any, tpu_slice: Any, compiled: Any) -> dict[str, Any]:
    """The compiler's numbers for one chip, and the exposed communication.

    Raises:
      RuntimeError: the compiler gave no program (it does not fit, or its text can't be had).
    """
    from beit_jax.planning import estimate, workloads

    if compiled.program is None:
        raise RuntimeError(f"{tpu_slice.name}: {compiled.missing}")
    work = workloads.workload(config)
    images = config.run.batch_size // tpu_slice.chips
    seconds = estimate.step_time(
        compiled.program,
        tpu_slice,
        flops_per_chip=work.flops["step"] * images,
        hbm_bytes=compiled.hbm_bytes,
    )
    gradients = 4 * (work.parameters["encoder"] + work.parameters["head"])
    moved = {
        traffic.kind: {"calls": traffic.count, "bytes": traffic.bytes}
        for traffic in estimate.traffic(compiled.program, tpu_slice)
    }
    return {
        "slice": tpu_slice.name,
        "shape": "x".join(map(str, tpu_slice.shape)),
        "chips": tpu_slice.chips,
        "images": images,
        "cycles": compiled.program.cycles,
        "flops": compiled.flops,
        "temporary": compiled.temporary,
        "needed": compiled.needed,
        "collectives": moved,
        "bytes_per_gradient_byte": sum(sums["bytes"] for sums in moved.values()) / gradients,
        "ms_step": 1e3 * seconds.seconds,
        "ms_collectives": 1e3 * seconds.collectives,
        "exposed": 1 - seconds.cycles / seconds.seconds,
    }


def per_chip_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds cycles, FLOPs and temporary memory as multiples of the first slice's."""
    first = rows[0]
    return [
        row
        | {
            f"{name}_times": row[name] / first[name] if row[name] and first[name] else None
            for name in ("cycles", "flops", "temporary")
        }
        for row in rows
    ]


# ---------------------------------------------------------------------------- tables


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as aligned columns."""
    cells = [list(rows[0]), *([_show(value) for value in row.values()] for row in rows)]
    return text_table(cells, align="r" * len(cells[0]))


def _show(value: Any) -> str:
    if isinstance(value, dict):  # collectives
        return ", ".join(
            f"{kind} {sums['calls']:.0f}x {sums['bytes'] / 1e6:.1f} MB"
            for kind, sums in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
