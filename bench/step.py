"""Our pre-training step against PyTorch's: the same model, weights, batch and optimizer.

    python bench/step.py [--config=beit_base] [--batch=2] [--pairs=5] [--json=FILE]

The student alone, tokens given: forward, masked cross-entropy, backward, clip, AdamW. The peer is
`transformers`' BeitForMaskedImageModeling in eager mode with torch.optim.AdamW. On a CPU both are
pinned to one core, work in float32, and processor time is compared; on an accelerator, wall-clock
time, in bfloat16 (autocast there). Steps alternate, so that both see the same machine. Before
anything is timed both losses on the same batch must agree.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import processor_name  # beside this file

WARM_UP = 2  # steps of each that don't count


def main() -> None:
    """Measures, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="beit_base", help="a pre-training recipe in configs/")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", default="")
    flags = parser.parse_args()

    # One core, before either library counts them.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    from beit_jax.training import memory

    # Of the whole process: PyTorch gains from it as well. It must come before JAX.
    kept = not torch.cuda.is_available() and memory.keep_freed()
    import jax
    import transformers

    on_cpu = jax.default_backend() == "cpu"
    torch.set_num_threads(1)
    ours, theirs, losses = build(flags.config, batch=flags.batch, on_cpu=on_cpu)
    clock = time.process_time if on_cpu else time.perf_counter
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(WARM_UP + flags.pairs):
        for name, step in (("ours", ours), ("theirs", theirs)):
            began = clock()
            step()
            if turn >= WARM_UP:
                times[name].append(clock() - began)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind if not on_cpu else processor_name(),
        "versions": {
            "python": platform.python_version(),
            **{each.__name__: each.__version__ for each in (jax, torch, transformers)},
        },
        "config": flags.config,
        "batch": flags.batch,
        "dtype": "float32" if on_cpu else "bfloat16",
        "clock": "processor seconds, one core" if on_cpu else "seconds",
        "freed_memory_kept": kept,
        "losses": losses,
        "ours": statistics.median(times["ours"]),
        "theirs": statistics.median(times["theirs"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}; {versions}")
    print(f"{flags.config}, batch {flags.batch}, {result['dtype']}; losses {losses}")
    print(f"{result['clock']} a step, medians of {flags.pairs}:")
    print(f"  beit_jax                   {result['ours']:8.3f}")
    print(f"  transformers, eager        {result['theirs']:8.3f}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"  theirs / ours              {result['ratio']:8.2f}   ({spread})")
    if flags.json:
        Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.json).write_text(json.dumps(result, indent=2) + "\n")


def build(
    name: str, *, batch: int, on_cpu: bool
) -> tuple[Callable[[], None], Callable[[], None], dict[str, float]]:
    """One step of each side as a function that returns when it is done, and both first losses.

    Raises:
      SystemExit: the losses of the same weights on the same batch differ.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    import transformers

    from beit_jax import jobs
    from beit_jax.config import to_dict
    from beit_jax.models.heads import masked_image_model
    from beit_jax.tasks.pretrain import pretrain_task
    from beit_jax.tokenizers.loading import open_tokenizer
    from beit_jax.training import optim, state
    from beit_jax.weights.convert import export_checkpoint
    from beit_jax.weights.native import write_params

    config = jobs.parse_job(importlib.import_module(f"configs.{name}").get_config().to_dict())
    slots, tokens, size = config.data.mask.count, config.model.tokens, config.model.image_size
    tokenizer = open_tokenizer(config.tokenizer)
    model = masked_image_model(config.model, vocabulary=tokenizer.vocabulary)
    task = pretrain_task(
        model,
        tokenizer,
        tokenizer_params=jax.eval_shape(tokenizer.init, jax.random.key(0)),
        config=config,
        slots=slots,
    )
    # Tokens are in the batch: the student alone.
    task = dataclasses.replace(task, prepare=lambda frozen, given, key: given, frozen={})

    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    order = np.stack([rng.permutation(tokens)[:slots] for _ in range(batch)])
    positions = np.sort(order, axis=1).astype(np.int32)
    mask = np.zeros((batch, tokens), bool)
    np.put_along_axis(mask, positions, True, axis=1)
    labels = rng.integers(0, tokenizer.vocabulary, positions.shape).astype(np.int32)
    given = {
        "image": jnp.asarray(images),
        "mask": jnp.asarray(mask),
        "positions": jnp.asarray(positions),
        "labels": jnp.asarray(labels),
        "weights": jnp.ones(positions.shape, jnp.float32),
    }
    optimizer = optim.adamw(config.optimizer)
    params = jax.jit(task.init)(jax.random.key(0))
    rate = config.optimizer.learning_rate

    def train_step(train_state: state.TrainState) -> tuple[state.TrainState, dict[str, Any]]:
        return state.train_step(
            train_state,
            {},
            given,
            task=task,
            config=config.optimizer,
            optimizer=optimizer,
            schedule=lambda step: jnp.asarray(rate),
            seed=0,
        )

    with tempfile.TemporaryDirectory() as folder:
        write_params(f"{folder}/ours", params, config=to_dict(config))
        export_checkpoint(f"{folder}/ours", format="hugging_face", output=f"{folder}/theirs")
        peer = transformers.BeitForMaskedImageModeling.from_pretrained(f"{folder}/theirs")
    device = "cpu" if on_cpu else "cuda"
    peer = peer.to(device)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    hidden = torch.from_numpy(mask).to(device)
    targets = torch.from_numpy(labels.reshape(-1)).long().to(device)
    decayed = [p for p in peer.parameters() if p.ndim > 1]
    others = [p for p in peer.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=rate,
    )

    def peer_loss() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=not on_cpu):
            # In the order of the mask, row by row: that of the sorted positions. All patches go
            # through its head, as its own loss has it.
            logits = peer(pixels, bool_masked_pos=hidden).logits[hidden]
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    jitted = jax.jit(train_step, donate_argnums=0)
    fresh = functools.partial(state.state_from_params, optimizer=optimizer)
    held = {"state": jax.jit(fresh)(params)}
    peer.eval()
    with torch.no_grad():
        theirs_first = float(peer_loss())
    ours_first = jax.jit(lambda p: task.loss(p, given, None, 0)[1])(params)
    losses = {"ours": float(ours_first["loss"] / ours_first["weight"]), "theirs": theirs_first}
    if abs(losses["ours"] - losses["theirs"]) > (1e-4 if on_cpu else 5e-2) * losses["ours"]:
        sys.exit(f"not the same model: losses {losses}")
    peer.train()

    def ours() -> None:
        held["state"], metrics = jitted(held["state"])
        jax.block_until_ready(metrics)

    def theirs() -> None:
        adamw.zero_grad(set_to_none=True)
        peer_loss().backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.optimizer.clip_norm or 1e9)
        adamw.step()
        if not on_cpu:
            torch.cuda.synchronize()

    return ours, theirs, losses


if __name__ == "__main__":
    main()
