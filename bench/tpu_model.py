"""libtpu's cost model of the training step, without a TPU: parts, kernels, ratios to peak.

    python bench/tpu_model.py block [--chips=v4,v5e,v5p,v6e] [--sizes=base,large] [--batch=64]
    python bench/tpu_model.py kernels [--chips=...]
    python bench/tpu_model.py tokenizer [--chips=...]
    python bench/tpu_model.py step [--chips=...] [--sizes=...]

"block" is the cost of one more encoder block, forward and backward, beside deit3-jax's; "kernels"
compiles the Pallas kernels alone and reads libtpu's schedule of them; "tokenizer" is the DALL-E
encoder up to the ids; "step" is the whole train step on one host.

The method and its faults: the compiler writes `estimated_cycles` beside every instruction; over the
chip's clock they are seconds, 8 to 12 % too many on the two published v4 runs that can be compared.
Custom kernels have none. This project's kernels count with the larger of two times: (a) padded
FLOPs over peak, vector operations over the vector unit's rate, or bytes over bandwidth, whichever
is longest, divided by 0.6; (b) the bundles of instructions that libtpu schedules, with loops times
their trips, at one per cycle. A kernel that declares no cost fails the bench.

MFU is of the published definition: matrix products forward and backward, 197 tokens, the head on
75, the tokenizer once forward, no recomputation; peak is bfloat16's.

Needs libtpu, and one process at a time may use it.
"""

import argparse
import dataclasses
import functools
import glob
import importlib
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import save  # beside this file

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.models.blocks import Block
from beit_jax.models.flops import encoder_flops, matmul_flops, patch_embedding_flops
from beit_jax.models.initialization import PRETRAINING
from beit_jax.models.kernels import fused_attention
from beit_jax.planning import ahead_of_time, estimate, hlo, slices, workloads
from beit_jax.tokenizers.loading import open_tokenizer

SMALLEST = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
KERNELS = ("attention_forward", "attention_backward")
LANES, SUBLANES = 128, 8
# Vector instructions a bundle has room for, as libtpu's dumps say ("CAPACITY: ... VALU").
VECTOR_SLOTS = {"v4": 2, "v5e": 4, "v5p": 4, "v6e": 4}


def main() -> None:
    """Measures one table, prints it and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("block", "kernels", "tokenizer", "step"))
    parser.add_argument("--chips", default="v4,v5e,v5p,v6e")
    parser.add_argument("--sizes", default="base,large")
    parser.add_argument("--batch", type=int, default=64, help="images a chip")
    parser.add_argument("--residual", default="", help="dtype of the residual stream")
    parser.add_argument("--ours_only", action="store_true", help="without the deit3-jax-like block")
    parser.add_argument("--instructions", type=int, default=0, help="costliest ones to list")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    rows = []
    for chip in flags.chips.split(","):
        for size in flags.sizes.split(",") if flags.table != "tokenizer" else ["dalle"]:
            rows += TABLES[flags.table](chip, size, flags)
    libtpu = importlib.import_module("importlib.metadata").version("libtpu")
    versions = {"python": platform.python_version(), "jax": jax.__version__, "libtpu": libtpu}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for row in rows:
        print("  ".join(f"{key} {_text(value)}" for key, value in row.items()))
    result = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "rows": rows}
    save(result, flags.json)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def recipe(size: str) -> Any:
    """The pre-training recipe of a size, as on a TPU."""
    from beit_jax import jobs

    values = importlib.import_module(f"configs.beit_{size}").get_config().to_dict()
    values["tokenizer"] |= {"path": "", "random_weights": True}
    return ahead_of_time.for_tpu(jobs.parse_job(values))


def smallest_slice(chip: str) -> slices.Slice:
    """The smallest slice of a chip."""
    return slices.parse_slice(SMALLEST[chip])


def compile_on(chip: str, function: Any, *shapes: Any) -> tuple[Any, str]:
    """Compiles a function of shapes for one device of a chip; also the program's text."""
    device = ahead_of_time.devices(smallest_slice(chip))[0]
    where = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes
    )
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as dump:
        compiled = ahead_of_time.compile_with_dump(lowered, dump)
        text, missing = ahead_of_time.program_text(compiled, dump)
    if text is None:
        sys.exit(missing)
    return compiled, text


def kernel_bounds(chip: str, cost: fused_attention.Cost) -> dict[str, float]:
    """Seconds a kernel takes at least: matrix unit, vector unit, memory."""
    description = smallest_slice(chip).chip
    cores = 2 if description.config_name else 1
    vector = VECTOR_SLOTS[chip] * LANES * SUBLANES * description.clock * cores
    return {
        "matrix": cost.flops / description.peak,
        "vector": cost.vector / vector,
        "memory": cost.bytes / description.hbm_bandwidth,
    }


@functools.cache
def kernel_seconds(chip: str, *, batch: int, tokens: int, heads: int) -> dict[str, float]:
    """Seconds of a forward and a backward call, by name: the larger of bound / 0.6 and schedule."""
    cut = fused_attention.choose_layout(batch=batch, tokens=tokens, heads=heads)
    scheduled = schedule(chip, batch=batch, tokens=tokens, heads=heads)
    result = {}
    for name, backward in zip(KERNELS, (False, True), strict=True):
        spent = fused_attention.cost(cut, dtype=jnp.bfloat16, backward=backward)
        bound = max(kernel_bounds(chip, spent).values()) / estimate.KERNEL_EFFICIENCY
        result[name] = max(bound, scheduled[name])
    return result


def kernel_calls(program: hlo.Program) -> dict[str, float]:
    """How often the kernels are called; exits where a kernel has no cost."""
    calls = dict.fromkeys(KERNELS, 0.0)
    for work in program.uncosted:
        if not work.kernel:
            continue
        name = next((name for name in KERNELS if name in work.name), "")
        if not work.declared or not name:
            sys.exit(f"the kernel {work.name} has no cost: what it takes would look free")
        calls[name] += work.runs
    return calls


def program_seconds(
    chip: str, program: hlo.Program, *, batch: int, tokens: int, heads: int
) -> dict[str, float]:
    """Seconds of the compiler's cycles and of the native kernels; exits where one has no cost."""
    calls = kernel_calls(program)
    kernels = 0.0
    if any(calls.values()):
        costs = kernel_seconds(chip, batch=batch, tokens=tokens, heads=heads)
        kernels = sum(runs * costs[name] for name, runs in calls.items())
    return {"compiler": program.cycles / smallest_slice(chip).chip.clock, "kernels": kernels}


def block_table(chip: str, size: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The cost of one more block: two blocks less one."""
    config = recipe(size).model
    if flags.residual:
        config = dataclasses.replace(config, residual_dtype=flags.residual)
    tokens = config.tokens + 1
    blocks = encoder_flops(config) - patch_embedding_flops(config)
    useful = 3 * flags.batch * blocks / config.layers
    rows = []
    for name, make in (("native", native_blocks), ("deit3-jax-like", deit3_blocks)):
        if name != "native" and flags.ours_only:
            continue
        seconds, memory, flops, texts = [], [], [], []
        for layers in (1, 2):
            function, shapes = make(config, layers=layers, batch=flags.batch)
            compiled, text = compile_on(chip, function, *shapes)
            sizes = {"batch": flags.batch, "tokens": tokens, "heads": config.heads}
            program = hlo.read(text)
            seconds.append(program_seconds(chip, program, **sizes))
            memory.append(compiled.memory_analysis().temp_size_in_bytes)
            flops.append(_program_flops(compiled, program, config, batch=flags.batch))
            texts.append(text)
        compiler, kernels = (seconds[1][key] - seconds[0][key] for key in ("compiler", "kernels"))
        rows.append(
            {
                "table": "block",
                "chip": chip,
                "size": size,
                "block": name,
                "images": flags.batch,
                "residual": config.residual_dtype if name == "native" else "float32",
                "milliseconds": 1e3 * (compiler + kernels),
                "of which kernels": 1e3 * kernels,
                "MFU": useful / (compiler + kernels) / smallest_slice(chip).chip.peak,
                "XLA's FLOPs / ours": (flops[1] - flops[0]) / useful,
                "temporary GB": (memory[1] - memory[0]) / 1e9,
            }
        )
        _print_instructions(texts[1], flags.instructions)
    return rows


def _program_flops(compiled: Any, program: hlo.Program, config: Any, *, batch: int) -> float:
    """XLA's count, with a kernel's products counted without their padding."""
    declared = sum(work.flops for work in program.uncosted if work.kernel)
    forward, backward = kernel_calls(program).values()
    worth = 4 * batch * (config.tokens + 1) ** 2 * config.width * (forward + 2 * backward)
    return compiled.cost_analysis()["flops"] - declared + worth


def _print_instructions(text: str, count: int) -> None:
    """The costliest instructions of a program."""
    found = []
    for line in text.splitlines():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and line.startswith("  "):
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                (int(cycles.group(1)), line.strip()[:100], source and source.group(1)[-60:])
            )
    for line in sorted(found, key=lambda line: -line[0])[:count]:
        print(*line)


def native_blocks(config: Any, *, layers: int, batch: int) -> tuple[Any, tuple]:
    """`layers` native blocks with one bias: output and all gradients."""
    build = functools.partial(Block, config, init=PRETRAINING)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype),
        nnx.to_pure_dict(state),
    )
    n = config.tokens + 1
    x = jax.ShapeDtypeStruct((batch, n, config.width), jnp.dtype(config.residual_dtype))
    bias = jax.ShapeDtypeStruct((1, config.heads, n, n), jnp.float32)

    def forward(params, x, bias):
        for layer in range(layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf, at=layer: leaf[at], params))
            x = block(x, shared_bias=bias, factors=None)
        return x

    return _with_gradients(forward), (x, stacked, x, bias)


def deit3_blocks(config: Any, *, layers: int, batch: int) -> tuple[Any, tuple]:
    """Blocks as deit3-jax writes them: float32 activations, XLA's attention, no score bias."""
    d, h, m = config.width, config.heads, config.mlp_width
    k = d // h
    shapes = {
        "norm1": (2, d),
        "qkv": (3, d, h, k),
        "qkv_bias": (3, h, k),
        "out": (h, k, d),
        "norm2": (2, d),
        "up": (d, m),
        "down": (m, d),
        "vectors": (4, d),
        "up_bias": (m,),
    }
    stacked = {
        name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in shapes.items()
    }

    def norm(x, weights):
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * weights[0] + weights[1]

    def forward(params, x):
        for layer in range(layers):
            p = {name: leaf[layer] for name, leaf in params.items()}
            out_bias, down_bias, scale1, scale2 = p["vectors"]
            y = norm(x, p["norm1"])
            q, key, v = (
                jnp.einsum("bnd,dhk->bnhk", y, p["qkv"][i]) + p["qkv_bias"][i] for i in range(3)
            )
            weights = jax.nn.softmax(jnp.einsum("bqhk,bnhk->bhqn", q / k**0.5, key))
            y = jnp.einsum("bhqn,bnhk->bqhk", weights, v)
            x = x + scale1 * (jnp.einsum("bnhk,hkd->bnd", y, p["out"]) + out_bias)
            y = jax.nn.gelu(norm(x, p["norm2"]) @ p["up"] + p["up_bias"])
            x = x + scale2 * (y @ p["down"] + down_bias)
        return x

    x = jax.ShapeDtypeStruct((batch, config.tokens + 1, d), jnp.float32)
    return _with_gradients(forward), (x, stacked, x)


def _with_gradients(forward: Any) -> Any:
    def both(gradient, *arguments):
        result, back = jax.vjp(forward, *arguments)
        return result, back(gradient)

    return both


def kernels_table(chip: str, size: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Bounds and schedule of every kernel."""
    config = recipe(size).model
    sizes = {"batch": flags.batch, "tokens": config.tokens + 1, "heads": config.heads}
    cut = fused_attention.choose_layout(**sizes)
    scheduled = schedule(chip, **sizes)
    rows = []
    for name, backward in zip(KERNELS, (False, True), strict=True):
        spent = fused_attention.cost(cut, dtype=jnp.bfloat16, backward=backward)
        bounds = kernel_bounds(chip, spent)
        rows.append(
            {"table": "kernels", "chip": chip, "size": size, "images": flags.batch, "kernel": name}
            | {f"{unit} ms": 1e3 * seconds for unit, seconds in bounds.items()}
            | {
                "bound / 0.6 ms": 1e3 * max(bounds.values()) / estimate.KERNEL_EFFICIENCY,
                "scheduled ms": 1e3 * scheduled[name],
            }
        )
    return rows


@functools.cache
def schedule(chip: str, *, batch: int, tokens: int, heads: int) -> dict[str, float]:
    """Seconds of the kernels alone by the instructions that libtpu schedules.

    In a process of its own, since libtpu reads what to dump when it starts.
    """
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, __file__, "--dump", chip, str(batch), str(tokens), str(heads)],
            check=True,
            env=os.environ
            | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"},
            stdout=subprocess.DEVNULL,
        )
        cut = fused_attention.choose_layout(batch=batch, tokens=tokens, heads=heads)
        description = smallest_slice(chip).chip
        cores = 2 if description.config_name else 1
        result = {}
        for name in KERNELS:
            paths = glob.glob(f"{folder}/*{name}*-final_bundles.txt")
            paths = [path for path in paths if "schedule" not in path]
            if len(paths) != 1:
                sys.exit(f"libtpu dumped {len(paths)} schedules of {name}")
            depths = [
                len(found.group(1))
                for found in re.finditer(
                    r"^\s*0x[0-9a-f]+[^:\n]*:\s*(>*) ?\{", Path(paths[0]).read_text(), re.MULTILINE
                )
            ]
            pairs, tiles, groups = cut.grid
            steps = pairs * tiles * groups
            # The grid is a loop (depth 1), the images of a step one in it (depth 2) unless there is
            # one image alone. Work of a first image (masking the bias) is counted for every one.
            inner = depths.count(2) * (cut.images if cut.images > 1 else 1)
            cycles = depths.count(0) + steps * (depths.count(1) + inner) / cores
            result[name] = cycles / description.clock
        return result


def dump_kernels(chip: str, batch: int, tokens: int, heads: int) -> None:
    """Compiles the kernels, so that libtpu dumps what its environment asks for."""
    x = jax.ShapeDtypeStruct((batch, tokens, heads * fused_attention.HEAD_WIDTH), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((heads, tokens, tokens), jnp.float32)
    compile_on(chip, _with_gradients(fused_attention.fused_attention), x, x, x, x, bias)


def tokenizer_table(chip: str, size: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The DALL-E encoder, ids of 75 positions, as the train step calls it."""
    del size
    config = recipe("base")
    tokenizer = open_tokenizer(config.tokenizer)
    params = tokenizer.encoding_params(jax.eval_shape(tokenizer.init, jax.random.key(0)))
    side = tokenizer.image_size
    images = jax.ShapeDtypeStruct((flags.batch, side, side, 3), jnp.uint8)
    positions = jax.ShapeDtypeStruct((flags.batch, config.data.mask.count), jnp.int32)

    def encode(params, images, positions):
        return tokenizer.encode(params, images, positions=positions)

    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    useful = flags.batch * matmul_flops(tokenizer.encode, params, one)
    compiled, text = compile_on(chip, encode, params, images, positions)
    seconds = hlo.read(text).cycles / smallest_slice(chip).chip.clock
    _print_instructions(text, flags.instructions)
    return [
        {
            "table": "tokenizer",
            "chip": chip,
            "images": flags.batch,
            "milliseconds": 1e3 * seconds,
            "images/s": flags.batch / seconds,
            "MFU": useful / seconds / smallest_slice(chip).chip.peak,
            "temporary GB": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        }
    ]


def step_table(chip: str, size: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole train step at `--batch` images a chip: shallow programs, continued."""
    config, tpu_slice = recipe(size), smallest_slice(chip)
    run = dataclasses.replace(config.run, batch_size=flags.batch * tpu_slice.chips)
    model = config.model
    if flags.residual:
        model = dataclasses.replace(model, residual_dtype=flags.residual)
    config = dataclasses.replace(config, run=run, model=model)
    compiled = ahead_of_time.compile_shallow(config, tpu_slice)
    if compiled.program is None:
        return [
            {
                "table": "step",
                "chip": chip,
                "size": size,
                "images": flags.batch,
                "missing": compiled.missing,
                "GiB": compiled.needed / 2**30,
            }
        ]
    task = workloads.task_of_shapes(config)
    sizes = {"batch": flags.batch, "tokens": model.tokens + 1, "heads": model.heads}
    parts = program_seconds(chip, compiled.program, **sizes)
    time_of = estimate.step_time(
        compiled.program,
        tpu_slice,
        flops_per_chip=flags.batch * task.flops_per_image,
        hbm_bytes=None,
    )
    shown = time_of.seconds - time_of.cycles
    seconds = parts["compiler"] + parts["kernels"] + shown
    return [
        {
            "table": "step",
            "chip": chip,
            "size": size,
            "images": flags.batch,
            "milliseconds": 1e3 * seconds,
            "of which kernels": 1e3 * parts["kernels"],
            "of which collectives, shown": 1e3 * shown,
            "images/s a chip": flags.batch / seconds,
            "MFU": flags.batch * task.flops_per_image / seconds / tpu_slice.chip.peak,
            "GiB": compiled.needed / 2**30,
        }
    ]


TABLES = {
    "block": block_table,
    "kernels": kernels_table,
    "tokenizer": tokenizer_table,
    "step": step_table,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--dump"]:
        dump_kernels(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
