"""One process of a small run, for tests of many: linear regression, or pre-training on a folder.

    python -m tests.distributed.worker '{"values": {...}, "workdir": "...", "cluster": {...}}'

Regression compiles in a second and its steps last as long as the test wants. Beside the run's
directory each process leaves `<workdir>.<process>.writes`, the paths it opened for writing, and
`<workdir>.<process>.indices`, which images each of its batches had. A key "clock" of what it is
asked sets the process' clocks forward by so many seconds.
"""

import dataclasses
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import jobs
from beit_jax.config import OptimizerConfig, RunConfig, RunError, to_dict
from beit_jax.training import loop
from beit_jax.training.state import Task

INPUTS, OUTPUTS = 4, 8  # divide over 1, 2, 4 and 8 devices
HELD_OUT = 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """A run whose steps, evaluation and compilation take as long as said (seconds)."""

    task: str = "regression"
    run: RunConfig
    optimizer: OptimizerConfig
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    compile_seconds: float = 0.0
    fail_process: int = -1  # raises RunError when its step `fail_step` is read
    fail_step: int = 0


def regression(config: RegressionConfig) -> Task:
    """y = x W with noise that follows the step."""

    def loss(params, batch, key, step):
        time.sleep(config.compile_seconds)  # while it is traced
        noise = 0.01 * jax.random.normal(key, batch["x"].shape)
        error = jnp.square((batch["x"] + noise) @ params["head"]["kernel"] - batch["y"]).sum()
        return error, {"loss": error, "weight": jnp.float32(batch["x"].shape[0])}

    def evaluate(params, frozen, batch):
        error = jnp.square(batch["x"] @ params["head"]["kernel"] - batch["y"]).sum(axis=1)
        valid = batch["valid"].astype(jnp.float32)
        return {"loss": (error * valid).sum(), "weight": valid.sum()}

    return Task(
        init=lambda key: {"head": {"kernel": jax.random.normal(key, (INPUTS, OUTPUTS))}},
        prepare=lambda frozen, batch, key: batch,
        loss=loss,
        evaluate=evaluate,
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={"one": np.ones(3, np.float32)},
        flops_per_image=1.0,
    )


def feed(config: RegressionConfig) -> loop.Feed:
    """This process' rows of each global batch, and of 21 held-out rows with padding."""
    size, process = config.run.batch_size, jax.process_index()
    local = size // jax.process_count()
    mine = slice(process * local, (process + 1) * local)
    truth = np.random.default_rng(1).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)

    def training(start):
        step = start
        while True:
            if process == config.fail_process and step == config.fail_step:
                raise RunError("half of the images can't be decoded")
            time.sleep(config.step_seconds)
            x = np.random.default_rng([7, step]).normal(size=(size, INPUTS)).astype(np.float32)
            yield {"x": x[mine], "y": (x @ truth)[mine]}
            step += 1

    def evaluation():
        x = np.random.default_rng(8).normal(size=(HELD_OUT, INPUTS)).astype(np.float32)
        for start in range(0, HELD_OUT, size):
            time.sleep(config.evaluation_seconds)
            padded = np.full((size, INPUTS), 1e6, np.float32)
            padded[: len(x[start : start + size])] = x[start : start + size]
            valid = np.arange(start, start + size) < HELD_OUT
            yield {"x": padded[mine], "y": (padded @ truth)[mine], "valid": valid[mine]}

    return loop.Feed(training=training, evaluation=evaluation, metrics=lambda: {"replaced": 1.0})


def run(config: RegressionConfig, *, workdir: str) -> dict:
    """The job, as `beit_jax.jobs` starts it."""
    trained = loop.train(
        loop.Job(task=regression(config), feed=feed(config)),
        run=config.run,
        optimizer_config=config.optimizer,
        config=to_dict(config),
        workdir=workdir,
    )
    return trained.evaluation


def record(workdir: str, process: int) -> None:
    """Notes what this process writes and which images it reads."""
    from beit_jax.data import pipeline

    writes = open(f"{workdir}.{process}.writes", "a")  # noqa: SIM115
    indices = open(f"{workdir}.{process}.indices", "a")  # noqa: SIM115

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            writing = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if path.startswith(f"{workdir}/") and writing:
                # `files.write_whole` writes beside the file and renames.
                whole = path[len(workdir) + 1 :].removesuffix(f".{os.getpid()}.tmp")
                print(whole, file=writes, flush=True)

    sys.addaudithook(audit)
    original = pipeline.training_batches

    def noted(*args, **kwargs):
        for batch in original(*args, **kwargs):
            print(json.dumps(batch["index"].tolist()), file=indices, flush=True)
            yield batch

    pipeline.training_batches = noted


def skew(seconds: float) -> None:
    """Sets this process' clocks forward."""
    wall, monotonic = time.time, time.monotonic
    time.time = lambda: wall() + seconds
    time.monotonic = lambda: monotonic() + seconds


def main() -> int:
    """Runs what the command line describes."""
    from absl import logging

    # TensorBoard's files are not what is tested, and their library takes seconds to import.
    sys.modules["clu"] = None
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    asked = json.loads(sys.argv[1])
    skew(asked.get("clock", 0.0))
    jobs.JOBS["regression"] = (RegressionConfig, run)
    if asked["values"]["task"] != "regression":
        record(asked["workdir"], max(asked["cluster"].get("process_id", 0), 0))
    return jobs.run_on_cluster(
        asked["values"], workdir=asked["workdir"], cluster_settings=asked["cluster"]
    )


if __name__ == "__main__":
    sys.exit(main())
