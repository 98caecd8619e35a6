"""The train loop fed from JPEGs against the same loop fed with one batch over and over.

    python bench/end_to_end.py --images=DIR [--config=beit_base] [--set KEY=VALUE ...]
                               [--batch=32] [--pairs=5] [--json=FILE]

Measures images per second of the train loop with everything but checkpoints and evaluation: files,
decoding, views, masks, the copy to the device, the tokenizer, the step and the log. The ratio is 1
where the step never waits. Runs alternate; a run reports the median of its logged intervals.

An accelerator runs the recipe as it is. On a CPU, JAX gets the last core and everything else the
other cores, like a device and its host, and the recipe's model becomes one that a single core can
train: two blocks of DeiT-tiny's width and a small discrete VAE, at the recipe's image sizes. The
tokenizer's weights are random, since only the speed counts.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import pretraining_task, processor_name, recipe, save  # beside this file

SMALL = [
    *("model.layers=2", "model.width=192", "model.heads=3", "model.mlp_width=768"),
    *("model.scan_unroll=2", "tokenizer.kind=dvae", "tokenizer.vocabulary=1024"),
    *("tokenizer.width=16", "tokenizer.levels=3", "tokenizer.codebook_width=16"),
]
INTERVALS = 4  # logged intervals of a run


def main() -> None:
    """Measures, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder of JPEGs")
    parser.add_argument("--config", default="beit_base", help="a pre-training recipe in configs/")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, model.layers=2"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of a logged interval")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", default="")
    flags = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[-1:])  # where JAX's threads will be, if its device is a CPU
    import jax

    on_cpu = jax.default_backend() == "cpu"
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[:-1] if on_cpu else cores)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.disable(logging.WARNING)  # the runs' own

    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name() if on_cpu else jax.devices()[0].device_kind,
        "cores": f"1 for JAX, {len(cores) - 1} for the rest" if on_cpu else os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "config": flags.config,
        "set": (SMALL if on_cpu else []) + flags.set,
        "batch": flags.batch,
        "pairs": flags.pairs,
    }
    print(f"{result['device']}, cores: {result['cores']}; jax {jax.__version__}")
    print(f"{flags.config} {' '.join(result['set'])}, batch {flags.batch}")
    result |= measure(open_config(result["set"], flags), pairs=flags.pairs)
    for name, row in result["runs"].items():
        print(
            f"  {name:10} {row['images_per_second']:8.1f} images/s, waiting"
            f" {100 * row['data_wait_share']:.1f} % of the time"
        )
    ratios = result["ratios"]
    print(
        f"  from JPEGs / repeated: {result['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    save(result, flags.json)


def open_config(settings: list[str], flags: argparse.Namespace) -> Any:
    """The recipe on the images, without evaluation and checkpoints."""
    from beit_jax import jobs

    values = recipe(flags.config, settings)
    values.data.update(source=f"folder:{flags.images}", eval_source=f"folder:{flags.images}")
    values.tokenizer.update(path="", random_weights=True)
    values.optimizer.warmup_steps = 0
    values.run.update(
        batch_size=flags.batch,
        steps=INTERVALS * flags.steps,
        log_every=flags.steps,
        eval_every=0,
        picture_every=0,
        checkpoint_every=0,
        checkpoint_minutes=0.0,
    )
    return jobs.parse_job(values.to_dict())


def measure(config: Any, *, pairs: int) -> dict[str, Any]:
    """Runs by what feeds them: speed, the share of time spent waiting, and the pairs' ratios."""
    from beit_jax.tasks.feed import image_feed

    feed = image_feed(
        config.data,
        run=config.run,
        grid=config.model.grid,
        keys=("image", "token_image", "mask"),
    )
    repeated = next(feed.training(0))

    def over_and_over(step: int) -> Iterator[dict[str, Any]]:
        del step
        return itertools.repeat(repeated)

    feeds = {
        "repeated": dataclasses.replace(feed, training=over_and_over, evaluation=lambda: []),
        "from JPEGs": dataclasses.replace(feed, evaluation=lambda: []),
    }
    task = pretraining_task(config)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in feeds}
    for _ in range(pairs):
        for name, feed in feeds.items():
            runs[name].append(train(config, task, feed))
    keys = ("images_per_second", "data_wait_share")
    speeds = {name: [run["images_per_second"] for run in runs_of] for name, runs_of in runs.items()}
    ratios = [b / a for a, b in zip(speeds["repeated"], speeds["from JPEGs"], strict=True)]
    return {
        "runs": {
            name: {key: statistics.median(run[key] for run in runs_of) for key in keys}
            | {"each": speeds[name]}
            for name, runs_of in runs.items()
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def train(config: Any, task: Any, feed: Any) -> dict[str, float]:
    """A run of its own: medians over its logged intervals."""
    from beit_jax.training import loop

    with tempfile.TemporaryDirectory() as workdir:
        loop.train(
            loop.Job(task=task, feed=feed),
            run=config.run,
            optimizer_config=config.optimizer,
            config={},
            workdir=workdir,
        )
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    return {
        key: statistics.median(line[key] for line in lines if key in line)
        for key in ("images_per_second", "data_wait_share")
    }


if __name__ == "__main__":
    main()
