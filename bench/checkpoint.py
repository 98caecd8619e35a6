"""Saving and restoring a run's state: seconds and GB/s against the number of parameters.

    python bench/checkpoint.py [--sizes=tiny,small,base] [--repeats=3] [--json=FILE]

Saves and restores parameters and Adam's moments in float32 with `training.checkpoint.Checkpoints`,
as a run does. `save` is the time that the train loop stands still, `background` the time of writing
meanwhile, `restore` the time until all arrays are on the device and compared with their digests.
The columns `digests` are the parts of saving and of restoring that the digests take; the rest is
what either took without them. A process compiles them at its first save or restore besides, once
for each shape (`digests_first` in the JSON). Medians of wall-clock seconds on a local disk; files
that were just written are read from memory (the system's page cache), so restoring from a cold disk
takes as long as the disk takes. The size "large" takes 3.7 GB on disk and 12 GB of memory, and is
measured only when named.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from machine import processor_name, save  # beside this file

from beit_jax.text_table import text_table

# layers, width, heads: paper §2.4 (base, large); tiny and small follow DeiT.
SIZES = {
    "tiny": (12, 192, 3),
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
VOCABULARY = 8192


def main() -> None:
    """Measures each size, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="tiny,small,base", help=f"of {','.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write; the system's temporary one")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()

    import jax
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.ERROR)
    # What only the first save takes, but for compiling the digests of shapes that are new.
    measure(SIZES["tiny"], repeats=1, folder=flags.folder)
    rows = [
        {"size": size, **measure(SIZES[size], repeats=flags.repeats, folder=flags.folder)}
        for size in flags.sizes.split(",")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name(),
        "cores": cores,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "orbax": orbax.checkpoint.__version__,
        },
        "clock": "seconds, local disk, page cache warm",
        "repeats": flags.repeats,
        "rows": rows,
    }
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}, {result['cores']} cores; {versions}")
    print(f"{result['clock']}; medians of {flags.repeats}")
    titles = ("size", "parameters", "state", "save", "digests", "background", "GB/s")
    titles += ("restore", "digests", "GB/s")
    cells = [
        (
            f"{row['size']}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['save']:.2f} s",
            f"{row['save_digests']:.3f} s",
            f"{row['background']:.2f} s",
            f"{row['saved_gb_per_second']:.2f}",
            f"{row['restore']:.2f} s",
            f"{row['restore_digests']:.3f} s",
            f"{row['restored_gb_per_second']:.2f}",
        )
        for row in rows
    ]
    print(text_table([titles, *cells], align="lrrrrrrrrr"))
    save(result, flags.json)


@contextlib.contextmanager
def timed(module: ModuleType, name: str, seconds: list[float]) -> Iterator[None]:
    """Appends the seconds that each call of a module's function takes."""
    function = getattr(module, name)

    def measured(*positional: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = function(*positional, **named)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(module, name, measured)
    try:
        yield
    finally:
        setattr(module, name, function)


def measure(size: tuple[int, int, int], *, repeats: int, folder: str | None) -> dict[str, Any]:
    """Medians of one size.

    Args:
      size: layers, width, heads.
      repeats: saves and restores, each in a directory of its own.
      folder: where these are made; None: the system's temporary one.
    """
    import jax

    from beit_jax.config import ModelConfig, OptimizerConfig, RunConfig
    from beit_jax.models.heads import masked_image_model
    from beit_jax.training import checkpoint, optim, sharding, state
    from beit_jax.weights import digests

    layers, width, heads = size
    config = ModelConfig(layers=layers, width=width, heads=heads, mlp_width=4 * width)
    task = state.Task(
        init=masked_image_model(config, vocabulary=VOCABULARY).init,
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    shapes = state.state_shapes(task, optimizer, sharding.make_mesh(fsdp=1))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = jax.jit(lambda key: state.init_state(task, optimizer, key), out_shardings=shardings)
    train_state = jax.block_until_ready(fresh(jax.random.key(0)))
    run = RunConfig(steps=1, batch_size=1)
    names = ("save", "save_digests", "background", "restore", "restore_digests")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    digests.item({"state": train_state}, config={})
    first = time.perf_counter() - began
    for _ in range(repeats):
        workdir = tempfile.mkdtemp(prefix="beit_jax_bench_", dir=folder)
        try:
            checkpoints = checkpoint.Checkpoints(
                workdir, run=run, config={"model": dataclasses.asdict(config)}
            )
            times = [time.perf_counter()]
            with timed(digests, "item", seconds["save_digests"]):
                checkpoints.save(train_state, step=int(train_state.step))
            times.append(time.perf_counter())
            checkpoints.close()
            times.append(time.perf_counter())
            checkpoints = checkpoint.Checkpoints(workdir, run=run, config={})
            times.append(time.perf_counter())
            with timed(digests, "arrays_problem", seconds["restore_digests"]):
                restored = jax.block_until_ready(checkpoints.restore(shapes))
            times.append(time.perf_counter())
            checkpoints.close()
        finally:
            shutil.rmtree(workdir)
        if restored is None:
            raise RuntimeError("nothing was restored")
        seconds["save"].append(times[1] - times[0])
        seconds["background"].append(times[2] - times[1])
        seconds["restore"].append(times[4] - times[3])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = [sum(pair) for pair in zip(seconds["save"], seconds["background"], strict=True)]
    size_in_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(train_state))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(train_state.params)),
        "bytes": size_in_bytes,
        **medians,
        "digests_first": first,
        "saved_gb_per_second": size_in_bytes / 1e9 / statistics.median(whole),
        "restored_gb_per_second": size_in_bytes / 1e9 / medians["restore"],
        "each": seconds,
    }


if __name__ == "__main__":
    main()
