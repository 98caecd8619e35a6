"""Prints the cost of drawing masks: microseconds of processor time per mask, in graph mode.

    python bench/masks.py [--grid=14] [--repeats=100] [--json=FILE]

Processor time is that of all threads, which a mask takes away from decoding images. Under
`taskset -c 0` it is one core's time, without the cost of waking the other cores.
"""

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from machine import processor_name, save

from beit_jax.config import MaskConfig
from beit_jax.data.masking import draw_masks


def measure(*, config: MaskConfig, grid: int, batch: int, repeats: int) -> tuple[float, float]:
    """Medians over `repeats` batches of processor and wall-clock microseconds per mask."""
    draw = tf.function(lambda keys: draw_masks(keys, config=config, grid=grid))
    warm_up = 5
    processor, wall = [], []
    for epoch in range(warm_up + repeats):
        keys = tf.constant([(0, epoch, index) for index in range(batch)], tf.int64)
        starts = time.process_time(), time.perf_counter()
        draw(keys).numpy()
        processor.append(time.process_time() - starts[0])
        wall.append(time.perf_counter() - starts[1])
    return tuple(statistics.median(t[warm_up:]) / batch * 1e6 for t in (processor, wall))


def main() -> None:
    """Measures every kind of mask in batches of 128 and 1,024."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{processor_name()}, {cores} cores; Python {platform.python_version()}, "
        f"TensorFlow {tf.__version__}, NumPy {np.__version__}"
    )
    print(f"{flags.grid} x {flags.grid} patches, median of {flags.repeats} batches, µs per mask")
    count = round(75 / 196 * flags.grid**2)
    masks = []
    for kind in ("block", "block_exact", "block_paper", "random"):
        for batch in (128, 1024):
            processor, wall = measure(
                config=MaskConfig(kind=kind, count=count),
                grid=flags.grid,
                batch=batch,
                repeats=flags.repeats,
            )
            masks.append({"kind": kind, "batch": batch, "processor": processor, "wall": wall})
            print(f"{kind:12s} batch {batch:5d}: {processor:6.1f} processor, {wall:6.1f} wall")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name(),
        "cores": cores,
        "clock": "microseconds per mask, medians",
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__},
        "grid": flags.grid,
        "repeats": flags.repeats,
        "masks": masks,
    }
    save(result, flags.json)


if __name__ == "__main__":
    main()
