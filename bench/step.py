"""The pre-training step against PyTorch's: the same model, weights, batch and optimizer.

    python bench/step.py [--config=beit_base] [--batch=2] [--pairs=5] [--compile] [--tokenizer]
                         [--keep_freed] [--set model.layers=2 ...] [--json=FILE]

Measures the student with given tokens: forward, masked cross-entropy, backward, clip, AdamW. With
`--tokenizer` it also measures the step that tokenises: here from uint8 views, as in training; in
PyTorch with the encoder of OpenAI's `dall_e` package, where that is installed, from normalised
views. The tokenizer's weights are random and the same for all sides, since only the speed counts.

The peers are `transformers`' BeitForMaskedImageModeling with torch.optim.AdamW as it comes and,
with `--compile` (the default on a GPU), PyTorch at its fastest: `torch.compile`, scaled dot product
attention, the fused AdamW, and only masked patches scored. On a CPU all sides are pinned to one
core and compute in float32, and processor time is compared; on a GPU, wall-clock time in bfloat16
(autocast). Every side has its own process, since they would fragment each other's heap; their steps
alternate, so that all see the same machine. The losses on the same batch must agree before anything
is timed.

Every side runs as its users run it. On a CPU the native side therefore keeps freed memory, as
main.py does (`training/memory.py`); `--keep_freed` gives the same to PyTorch.

Neither TensorFlow nor data is needed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from machine import Answering, processor_name, recipe, save  # beside this file

from beit_jax.text_table import text_table

WARM_UP = 2  # first steps of a side, which are not timed
NATIVE, EAGER, BEST = "beit_jax", "transformers, eager", "transformers, best"
PEERS = ("transformers", EAGER, BEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What all sides compute.

    Attributes:
      config: a PretrainConfig.
      task: the job's, with the tokenizer.
      params: the student's, float32.
      views: a batch as the input pipeline gives it: uint8 views and masks.
      given: the same batch with the tokens given, drawn at random.
      flops: of one image's training step, by whether the tokenizer is part of it.
    """

    config: Any
    task: Any
    params: Any
    views: dict[str, Any]
    given: dict[str, Any]
    flops: dict[bool, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation of the step.

    Attributes:
      step: runs one step and returns when it is done.
      loss: with the initial weights, without drop path.
      peak_memory: bytes; None where that is not known.
      facts: settings of the side, for the JSON.
    """

    step: Callable[[], None]
    loss: float
    peak_memory: int | None
    facts: dict[str, Any]


def main() -> None:
    """Measures, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="beit_base", help="a pre-training recipe in configs/")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings, model.layers=2",
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5, help="timed steps per side")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the best PyTorch, too"
    )
    parser.add_argument("--tokenizer", action="store_true", help="the step with tokenizer, too")
    parser.add_argument(
        "--keep_freed", action="store_true", help="give PyTorch, too, main.py's malloc settings"
    )
    parser.add_argument("--json", default="")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tokenize", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        serve(flags)
        return

    result: dict[str, Any] = {}
    for tokenize in (False, True) if flags.tokenizer else (False,):
        with contextlib.ExitStack() as stack:
            workers = open_workers(flags, stack, tokenize=tokenize)
            native = workers[NATIVE].hello
            if not result:
                result = {**about(flags, native), "steps": {}}
                print(f"{result['device']}; {_join(result['versions'])}")
                print(f"{' '.join([flags.config, *flags.set])}, batch {flags.batch}")
                print(f"{result['clock']} a step, medians of {flags.pairs}; {result['dtype']}")
                print(f"memory: {result['memory']}")
            name = "with tokenizer" if tokenize else "student"
            result["steps"][name] = measure(workers, pairs=flags.pairs, batch=flags.batch)
        show(name, result["steps"][name])
    save(result, flags.json)


def about(flags: argparse.Namespace, native: dict[str, Any]) -> dict[str, Any]:
    """The settings, device and versions of the measurement."""
    on_cpu, version = native["on_cpu"], importlib.metadata.version
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": native["device"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "torch", "transformers")},
        },
        "config": flags.config,
        "set": flags.set,
        "batch": flags.batch,
        "pairs": flags.pairs,
        "dtype": "float32" if on_cpu else "bfloat16",
        "clock": "processor seconds, one core" if on_cpu else "seconds",
        "freed_memory_kept": {
            "ours": native["kept"],
            "PyTorch's": native["kept"] and flags.keep_freed,
        },
        "memory": "ours: the compiled step's arguments and temporaries; PyTorch's is not measured"
        if on_cpu
        else "ours: the device's peak since the start; PyTorch's: its allocator's peak in a step",
    }


def _join(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


class Worker(Answering):
    """A side in a process of its own, ready to step; ends the bench where it can't be had."""

    def __init__(self, side: str, *, tokenize: bool):
        command = [sys.executable, *sys.argv, f"--side={side}"]
        if tokenize:
            command.append("--tokenize")
        self._side = side
        super().__init__(command)

    def step(self) -> float:
        """Does one step; its seconds."""
        return self.ask()

    def _answer(self) -> Any:
        answer = super()._answer()
        if answer is None:
            sys.exit(f"the process of {self._side} ended; what it said is above")
        return answer


def open_workers(
    flags: argparse.Namespace, stack: contextlib.ExitStack, *, tokenize: bool
) -> dict[str, Worker]:
    """All sides after their warm-up, the native one first; the stack closes them.

    Raises:
      SystemExit: the losses of the same weights on the same batch differ.
    """
    workers: dict[str, Worker] = {}

    def add(name: str) -> Worker:
        workers[name] = stack.enter_context(Worker(name, tokenize=tokenize))
        return workers[name]

    native = add(NATIVE).hello
    if native["missing"]:
        print(f"no PyTorch beside the step with tokenizer: {native['missing']}")
        return workers
    best = flags.compile if flags.compile is not None else not native["on_cpu"]
    for name in PEERS if best else PEERS[:-1]:
        add(name)
    losses = {name: worker.hello["loss"] for name, worker in workers.items()}
    tolerance = 1e-4 if native["on_cpu"] else 5e-2
    if max(abs(loss / losses[NATIVE] - 1) for loss in losses.values()) > tolerance:
        sys.exit(f"not the same model: losses {losses}")
    return workers


# ---------------------------------------------------------------------------- in the processes


def serve(flags: argparse.Namespace) -> None:
    """Sets a side up, says hello, then does a step for every line and answers its seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    # The sides share a GPU: JAX must take what it needs, not three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import torch

    from beit_jax.training import memory

    on_cpu, kept = not torch.cuda.is_available(), False
    if on_cpu:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        if flags.side == NATIVE or flags.keep_freed:
            kept = memory.keep_freed()  # as main.py does; before JAX
    else:
        torch.backends.cudnn.benchmark = True  # official: run_beit_pretraining.py
    import jax

    from beit_jax.hardware import peak_flops

    wanted = "cpu" if on_cpu else "gpu"
    if jax.default_backend() != wanted:
        sys.exit(
            f"JAX works on the {jax.default_backend()}, PyTorch on the {wanted}: install both for"
            " the same, or choose with JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
        )
    clock = time.process_time if on_cpu else time.perf_counter
    problem = open_problem(flags)
    side = open_side(problem, flags.side, tokenize=flags.tokenize)
    hello = {
        "device": processor_name() if on_cpu else jax.devices()[0].device_kind,
        "on_cpu": on_cpu,
        "kept": kept,
        "missing": no_tokenizer(problem) if flags.tokenize else "",
        "flops": problem.flops[flags.tokenize],
        "peak_flops": peak_flops(),
        "loss": side.loss,
        "peak_memory": side.peak_memory,
        "facts": side.facts,
    }
    print(json.dumps(hello), file=answers, flush=True)
    for _ in sys.stdin:
        began = clock()
        side.step()
        print(clock() - began, file=answers, flush=True)


def open_problem(flags: argparse.Namespace) -> Problem:
    """The recipe, its random weights and a random batch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from beit_jax import jobs
    from beit_jax.models.flops import student_flops
    from beit_jax.models.heads import masked_image_model
    from beit_jax.preprocessing import normalize
    from beit_jax.tasks import pretrain
    from beit_jax.tokenizers.loading import open_tokenizer

    config = jobs.parse_job(recipe(flags.config, flags.set).to_dict())
    slots, tokens, size = config.data.mask.count, config.model.tokens, config.model.image_size
    tokenizer = open_tokenizer(config.tokenizer)
    model = masked_image_model(config.model, vocabulary=tokenizer.vocabulary)
    if flags.tokenizer:
        tokenizer_params = jax.jit(tokenizer.init)(jax.random.key(1))
    else:
        tokenizer_params = jax.eval_shape(tokenizer.init, jax.random.key(1))
    task = pretrain.pretrain_task(
        model, tokenizer, tokenizer_params=tokenizer_params, config=config, slots=slots
    )

    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(tokens)[:slots] for _ in range(flags.batch)])
    positions = np.sort(order, axis=1).astype(np.int32)
    mask = np.zeros((flags.batch, tokens), bool)
    np.put_along_axis(mask, positions, True, axis=1)
    views = {
        key: rng.integers(0, 256, (flags.batch, side, side, 3), dtype=np.uint8)
        for key, side in (("image", size), ("token_image", config.tokenizer.image_size))
    }
    given = {
        "image": normalize(jnp.asarray(views["image"]), kind=config.data.normalization),
        "mask": jnp.asarray(mask),
        "positions": jnp.asarray(positions),
        "labels": jnp.asarray(rng.integers(0, tokenizer.vocabulary, positions.shape), jnp.int32),
        "weights": jnp.ones(positions.shape, jnp.float32),
    }
    student = student_flops(config.model, vocabulary=tokenizer.vocabulary, slots=slots)
    return Problem(
        config=config,
        task=task,
        params=jax.jit(task.init)(jax.random.key(0)),
        views={key: jnp.asarray(value) for key, value in views.items()}
        | {"mask": jnp.asarray(mask.reshape(flags.batch, config.model.grid, config.model.grid))},
        given=given,
        flops={False: student, True: task.flops_per_image},
    )


def open_side(problem: Problem, name: str, *, tokenize: bool) -> Side:
    """A side, warm; `tokenize`: with the tokenizer."""
    from beit_jax.config import to_dict
    from beit_jax.weights.convert import export_checkpoint
    from beit_jax.weights.native import write_params

    if name == NATIVE:
        return native_side(problem, tokenize=tokenize)
    with tempfile.TemporaryDirectory() as folder:
        write_params(f"{folder}/native", problem.params, config=to_dict(problem.config))
        export_checkpoint(f"{folder}/native", format="hugging_face", output=f"{folder}/exported")
        return pytorch_side(
            problem,
            f"{folder}/exported",
            best=name == BEST,
            tokenize=tokenize,
            attention={EAGER: "eager", BEST: "sdpa"}.get(name, ""),
        )


def no_tokenizer(problem: Problem) -> str:
    """Why PyTorch cannot compute the token ids; "" where it can."""
    from beit_jax.tokenizers.dalle import DalleConfig

    if not isinstance(problem.config.tokenizer, DalleConfig):
        return "its tokenizer is DALL-E's, and the recipe's is another"
    try:
        importlib.import_module("dall_e")
    except ImportError as error:
        return f"it needs the DALL_E package ({error})"
    return ""


def native_side(problem: Problem, *, tokenize: bool) -> Side:
    """The native step, compiled and warm."""
    import jax
    import jax.numpy as jnp

    from beit_jax.models.attention import resolve_implementation
    from beit_jax.models.blocks import compute_dtype
    from beit_jax.training import optim, state

    config, task, batch = problem.config, problem.task, problem.views
    if not tokenize:
        task = dataclasses.replace(task, prepare=lambda frozen, given, key: given, frozen={})
        batch = problem.given
    optimizer = optim.adamw(config.optimizer)

    def train_step(
        train_state: state.TrainState, frozen: Any, batch: state.Batch
    ) -> tuple[state.TrainState, dict[str, jax.Array]]:
        return state.train_step(
            train_state,
            frozen,
            batch,
            task=task,
            config=config.optimizer,
            optimizer=optimizer,
            schedule=lambda step: jnp.asarray(config.optimizer.learning_rate),
            seed=0,
        )

    def first_loss(params: Any, frozen: Any, batch: state.Batch) -> jax.Array:
        _, sums = task.loss(params, task.prepare(frozen, batch, None), None, 0)
        return task.metrics(sums)["loss"]

    loss = float(jax.jit(first_loss)(problem.params, task.frozen, batch))
    # Copied, since the step takes its state's memory over.
    fresh = functools.partial(state.state_from_params, optimizer=optimizer)
    held = {"state": jax.jit(fresh)(jax.tree.map(jnp.copy, problem.params))}
    lowered = jax.jit(train_step, donate_argnums=0).lower(held["state"], task.frozen, batch)
    compiled = lowered.compile()

    def step() -> None:
        held["state"], metrics = compiled(held["state"], task.frozen, batch)
        jax.block_until_ready(metrics)

    for _ in range(WARM_UP):
        step()
    device = jax.devices()[0]
    needed = compiled.memory_analysis()
    program = needed.argument_size_in_bytes + needed.temp_size_in_bytes
    on_cpu = device.platform == "cpu"
    peak = program if on_cpu else device.memory_stats()["peak_bytes_in_use"]
    facts = {
        "dtype": str(compute_dtype(config.model)),
        "attention": resolve_implementation(
            config.model.attention,
            head_width=config.model.width // config.model.heads,
            platform=device.platform,
        ),
        "program_memory_bytes": program,  # arguments and temporaries
        "scored": "masked patches",
    }
    if tokenize:
        facts["tokenizer"] = str(compute_dtype(config.tokenizer))
    return Side(step=step, loss=loss, peak_memory=peak, facts=facts)


def pytorch_side(
    problem: Problem, folder: str, *, best: bool, tokenize: bool, attention: str = ""
) -> Side:
    """PyTorch's step, warm.

    Args:
      folder: the same weights as `transformers` has them.
      best: compiled, with fused kernels; else with the defaults.
      tokenize: whether the tokenizer is part of the step.
      attention: transformers' `attn_implementation`; "": its own choice.
    """
    import numpy as np
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = problem.config
    peer = transformers.BeitForMaskedImageModeling.from_pretrained(
        folder, **({"attn_implementation": attention} if attention else {})
    ).to(device)

    given = {name: torch.from_numpy(np.array(leaf)) for name, leaf in problem.given.items()}
    pixels = given["image"].permute(0, 3, 1, 2).contiguous().to(device)
    hidden, positions = given["mask"].to(device), given["positions"].long().to(device)
    labels = given["labels"].long().to(device)
    if tokenize:
        from dall_e.utils import map_pixels

        encoder = pytorch_tokenizer(problem).to(device)
        seen = torch.from_numpy(np.array(problem.views["token_image"])).permute(0, 3, 1, 2)
        seen = map_pixels(seen.float() / 255).contiguous().to(device)

    decayed = [p for p in peer.parameters() if p.ndim > 1]
    others = [p for p in peer.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.optimizer.learning_rate,
        **({"fused": True} if best else {}),
    )

    @torch.no_grad()
    def name_tokens() -> torch.Tensor:
        return torch.take_along_dim(encoder(seen).argmax(1).flatten(1), positions, dim=1)

    def loss_of(labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            if best:  # shapes that the compiler knows, as the official model scores them
                features = peer.beit(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
                features = torch.take_along_dim(features, positions[..., None], dim=1)
                logits = peer.lm_head(peer.layernorm(features)).flatten(0, 1)
            else:
                # In the order of the mask, row by row: that of the sorted positions. All patches
                # go through its head, as its own loss has it.
                logits = peer(pixels, bool_masked_pos=hidden).logits[hidden]
        return torch.nn.functional.cross_entropy(logits.float(), labels.flatten())

    peer.eval()
    with torch.no_grad():
        loss = float(loss_of(name_tokens() if tokenize else labels))
    peer.train()
    if best:
        loss_of = torch.compile(loss_of)
        name_tokens = torch.compile(name_tokens)

    def step() -> None:
        adamw.zero_grad(set_to_none=True)
        loss_of(name_tokens() if tokenize else labels).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.optimizer.clip_norm or 1e9)
        adamw.step()
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    peak = None
    if on_gpu:
        # Of one more step: what the first ones try out is not the step's.
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    facts = {
        "dtype": "bfloat16 autocast" if on_gpu else "float32",
        "attention": peer.config._attn_implementation,
        "compiled": best,
        "optimizer": "AdamW, fused" if best else "AdamW",
        "scored": "masked patches" if best else "all patches",
    }
    if tokenize:
        # The package's own choice; the last convolution is always float32.
        facts["tokenizer"] = "float16" if on_gpu else "float32"
    return Side(step=step, loss=loss, peak_memory=peak, facts=facts)


def pytorch_tokenizer(problem: Problem) -> Any:
    """DALL-E's encoder, openai's module, with the native side's random weights."""
    import dall_e
    import jax
    import numpy as np
    import torch

    from beit_jax.models.functional import flatten
    from beit_jax.weights import dalle, keys

    settings = problem.config.tokenizer
    encoder = dall_e.Encoder(n_hid=settings.width, vocab_size=settings.vocabulary)
    native = flatten(jax.device_get(problem.task.frozen["encoder"]))
    state = keys.to_foreign(native, dalle.TABLE)
    encoder.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state.items()})
    return encoder


def measure(workers: dict[str, Worker], *, pairs: int, batch: int) -> dict[str, Any]:
    """Times the sides in turn; everything about them for the JSON."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(pairs):
        for name, worker in workers.items():
            times[name].append(worker.step())
    flops, peak, rows = workers[NATIVE].hello["flops"], workers[NATIVE].hello["peak_flops"], {}
    for name, worker in workers.items():
        seconds = statistics.median(times[name])
        ratios = [b / a for a, b in zip(times[NATIVE], times[name], strict=True)]
        rows[name] = {
            **worker.hello["facts"],
            "loss": worker.hello["loss"],
            "seconds": seconds,
            "images_per_second": batch / seconds,
            "mfu": None if peak is None else flops * batch / seconds / peak,
            "peak_memory_bytes": worker.hello["peak_memory"],
            "each": times[name],
        }
        if name != NATIVE:
            rows[name] |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return {"flops_per_image": flops, "sides": rows}


def show(name: str, measured: dict[str, Any]) -> None:
    """Prints a table of one kind of step."""
    print(f"\n{name}: {measured['flops_per_image'] / 1e9:.4g} GFLOP an image")
    titles = ("attention", "seconds", "images/s", "MFU", "GB", "loss", "theirs / ours")
    rows = [("", *titles)]
    for side, row in measured["sides"].items():
        mfu, memory = row["mfu"], row["peak_memory_bytes"]
        ratio = ""
        if "ratio" in row:
            ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        rows.append(
            (
                f"  {side}",
                row["attention"],
                f"{row['seconds']:.4g}",
                f"{row['images_per_second']:.4g}",
                "-" if mfu is None else f"{mfu:.1%}",
                "-" if memory is None else f"{memory / 1e9:.3g}",
                f"{row['loss']:.4f}",
                ratio,
            )
        )
    gaps = [""] * (len(titles) - 1) + ["   "]
    print(text_table(rows, align="lrrrrrrl", gaps=gaps, widths=(22, *[10] * (len(titles) - 1))))


if __name__ == "__main__":
    main()
