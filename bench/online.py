"""What pictures and the evaluation between steps cost of a pre-training run's time.

    python bench/online.py [--config=quickstart] [--set KEY=VALUE ...] [--periods=3] [--pairs=3]
                           [--json=FILE]

Two runs of the same steps alternate: one with pictures and `config.online` at the recipe's period,
one with neither (the held-out loss and checkpoints are in neither). Each is timed from the end of
its first period, which compiles, to the end of its last, through whole periods; so a period of
steps is compared with the same steps and what comes after them. The ratio of a pair is noisy
where other programs share the machine. Less so is the share: what pictures and evaluation took
themselves over what the steps between them took, in one run. On a CPU processor time is compared,
elsewhere wall-clock time.

An accelerator takes a recipe of its own by `--config` and `--set`. The tokenizer's weights are
random, since only the speed counts.
"""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from machine import processor_name, recipe, save  # beside this file

SIDES = ("without", "with")


def main() -> None:
    """Measures, prints a table and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="a pre-training recipe in configs/")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, run.batch_size=8"
    )
    parser.add_argument("--periods", type=int, default=3, help="of a run; the first is not timed")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.disable(logging.WARNING)  # the runs' own
    import jax

    config, on_cpu = open_config(flags), jax.default_backend() == "cpu"
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name() if on_cpu else jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "config": flags.config,
        "set": flags.set,
        "pairs": flags.pairs,
        "clock": "processor seconds" if on_cpu else "seconds",
        "batch": config.run.batch_size,
        "online": dataclasses.asdict(config.online),
        "steps_timed": config.run.steps - config.online.every,
    }
    print(f"{result['device']}; jax {jax.__version__}; {flags.config} {' '.join(flags.set)}")
    result |= measure(config, pairs=flags.pairs)
    for side, seconds in result["step_seconds"].items():
        print(f"  {side:8} {seconds:8.4f} {result['clock']} a step, medians of {flags.pairs}")
    ratios = result["ratios"]
    print(f"  ratio {result['ratio']:.4f} ({min(ratios):.4f} to {max(ratios):.4f})")
    print(
        f"  pictures and evaluation take {result['extra_seconds']:.2f} a time:"
        f" {100 * result['share']:.2f} % of the steps between them"
    )
    save(result, flags.json)


def open_config(flags: argparse.Namespace) -> Any:
    """The recipe for a few periods, with pictures as often as the evaluation between steps."""
    from beit_jax import jobs

    values = recipe(flags.config, [])
    values = values.pretrain if "pretrain" in values else values
    for setting in flags.set:
        name, text = setting.split("=", 1)
        values.update_from_flattened_dict({name: type(_at(values, name))(text)})
    values.tokenizer.update(path="", random_weights=True)
    values.optimizer.warmup_steps = 0
    every = values.online.every
    if not every:
        raise SystemExit("config.online.every is 0: set a period, --set online.every=100")
    values.run.update(
        steps=flags.periods * every,
        log_every=every,
        eval_every=0,
        picture_every=every,
        checkpoint_every=0,
        checkpoint_minutes=0.0,
    )
    return jobs.parse_job(values.to_dict())


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def measure(config: Any, *, pairs: int) -> dict[str, Any]:
    """Seconds of a step on both sides, their ratios, and what the extras themselves take."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for pair in range(pairs):
        for side in SIDES if pair % 2 == 0 else reversed(SIDES):
            runs[side].append(train(config, extras=side == "with"))
    steps = {side: [run["step_seconds"] for run in runs[side]] for side in SIDES}
    ratios = [b / a for a, b in zip(steps["without"], steps["with"], strict=True)]
    return {
        "step_seconds": {side: statistics.median(values) for side, values in steps.items()},
        "each": steps,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "extra_seconds": statistics.median(run["extra_seconds"] for run in runs["with"]),
        "share": statistics.median(run["share"] for run in runs["with"]),
        "shares": [run["share"] for run in runs["with"]],
    }


def train(config: Any, *, extras: bool) -> dict[str, float]:
    """A run of its own: seconds of a step, extras included; of an extra; and the extras' share."""
    import jax

    from beit_jax.tasks.pretrain import build_job
    from beit_jax.training import loop
    from beit_jax.training.job import RunContext
    from beit_jax.training.startup import Startup

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    spans: list[tuple[int, float, float]] = []  # step, start, end

    def timed(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(train_state: Any) -> Any:
            step, began = int(train_state.step), clock()
            found = function(train_state)
            spans.append((step, began, clock()))
            return found

        return call

    mesh = loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(tempfile.TemporaryDirectory())
        context = RunContext(workdir=workdir, mesh=mesh, timer=Startup(), resources=stack)
        job = build_job(config, context)
        measures = job.online.measure if extras else lambda state: {}
        pictures = {name: timed(draw) for name, draw in job.pictures.items()} if extras else {}
        online = dataclasses.replace(job.online, measure=timed(measures))
        feed = dataclasses.replace(job.feed, evaluation=lambda: [])
        # One step more, so that the last period ends like the others.
        loop.train(
            dataclasses.replace(job, online=online, pictures=pictures, feed=feed),
            run=dataclasses.replace(config.run, steps=config.run.steps + 1),
            optimizer_config=config.optimizer,
            config={},
            workdir=workdir,
            mesh=mesh,
        )
    return times(spans, every=config.online.every, steps=config.run.steps)


def times(spans: list[tuple[int, float, float]], *, every: int, steps: int) -> dict[str, float]:
    """What `train` returns, from when extras (or nothing, in their place) began and ended."""
    periods = [
        list(of_step) for step, of_step in itertools.groupby(spans, lambda s: s[0]) if step <= steps
    ]
    first, *timed = periods
    extra = [sum(end - start for _, start, end in period) for period in timed]
    seconds = timed[-1][-1][2] - first[-1][2]
    assert len(timed) * every == steps - every
    return {
        "step_seconds": seconds / (steps - every),
        "extra_seconds": statistics.median(extra),
        "share": sum(extra) / (seconds - sum(extra)),
    }


if __name__ == "__main__":
    main()
