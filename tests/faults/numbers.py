"""NaN and infinities in images, loss and gradients, at chosen steps of a small run.

A fault is survived if the run does what `config.optimizer.max_bad_steps` promises: the updates of
bad steps are skipped and counted, whatever made them bad, and the result is finite and the same bit
for bit; too many in a row end the run at the step where the limit is reached. Every checkpoint is
finite, every logged step is there once, and a run that is cut off on the way ends no differently.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from beit_jax.config import OptimizerConfig, RunConfig
from beit_jax.training import loop
from beit_jax.training.state import Task
from tests.faults.row import Row

WIDTH, BATCH, STEPS = 4, 16, 12
# By the number that a batch says; what each does to the loss is in `_poisoned`.
KINDS = (
    "image NaN",
    "image infinite",
    "loss NaN",
    "loss infinite",
    "gradient NaN",
    "gradient huge",
)


class CutOff(RuntimeError):
    """Stands for whatever ends a run on its way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Steps (from 0) and the fault of each.

    Attributes:
      faults: step → index into `KINDS`.
      limit: `max_bad_steps`.
      accumulate: micro-batches; the fault is in one of them.
      cut_off: the step at which the run is cut off once; None: never.
    """

    faults: dict[int, int]
    limit: int
    accumulate: int
    cut_off: int | None

    def end(self) -> int | None:
        """The step that ends the run; None where it reaches its end."""
        in_row = 0
        for step in range(STEPS):
            in_row = in_row + 1 if step in self.faults else 0
            if in_row >= self.limit:
                return step + 1
        return None


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Tries `count` cases drawn with `seed`."""
    random = np.random.default_rng(seed)
    failures, faults, ended = [], 0, 0
    for number in range(count):
        case = draw(random)
        faults += len(case.faults)
        ended += case.end() is not None
        try:
            check(case, folder / str(number))
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}"[:1000])
    return Row(
        part="numbers",
        tried=count,
        survived=count - len(failures),
        failures=tuple(failures),
        note=f"{faults} bad steps; {ended} runs had too many in a row",
    )


def draw(random: np.random.Generator) -> Case:
    """A case: a third of the runs has so many bad steps that it should end early."""
    share = random.choice([0.15, 0.3, 0.6])
    bad = [step for step in range(STEPS) if random.random() < share]
    return Case(
        faults={step: int(random.integers(len(KINDS))) for step in bad},
        limit=int(random.integers(2, 5)),
        accumulate=int(random.choice([1, 2])),
        cut_off=int(random.integers(1, STEPS)) if random.random() < 0.5 else None,
    )


def check(case: Case, folder: Path) -> None:
    """Raises AssertionError where a run does not end as the case should."""
    plain = dataclasses.replace(case, cut_off=None, faults=dict.fromkeys(case.faults, 2))
    outcomes = [_outcome(plain, folder / "plain"), _outcome(case, folder / "run")]
    end = case.end()
    for outcome in outcomes:
        expected = STEPS if end is None else end - 1  # the step that is too much is not logged
        assert outcome["steps"] == list(range(1, expected + 1)), outcome["steps"]
        skipped = sum(step < expected for step in case.faults)
        assert outcome["skipped"] == skipped, f"{outcome['skipped']} skipped"
        assert (outcome["error"] == "") == (end is None), outcome["error"]
        if end is not None:
            assert f"step {end}: {case.limit} updates in a row" in outcome["error"]
        assert outcome["finite"], "a checkpoint is not finite"
    # What made a step bad leaves no trace, nor does the cut.
    for first, second in zip(*(outcome["params"] for outcome in outcomes), strict=True):
        np.testing.assert_array_equal(first, second)


def _outcome(case: Case, workdir: Path) -> dict:
    cut_off, error = case.cut_off, ""
    while True:
        try:
            _train(case, workdir, cut_off=cut_off)
        except CutOff:
            cut_off = None
            continue
        except loop.NonFiniteError as stop:
            error = str(stop)
        break
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    states = [_stored(path) for path in sorted((workdir / "checkpoints").iterdir(), key=_step)]
    leaves = [leaf for state in states for leaf in jax.tree.leaves(state)]
    return {
        "steps": [line["step"] for line in lines],
        "skipped": int(lines[-1]["skipped"]),
        "error": error,
        "finite": all(np.isfinite(leaf).all() for leaf in leaves),
        "params": jax.tree.leaves(states[-1]) if states else [],
    }


def _step(path: Path) -> int:
    return int(path.name)


def _stored(checkpoint: Path) -> dict:
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(checkpoint / "state").item_metadata.tree
        # Without the sharding that it was written with.
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        arguments = ocp.args.PyTreeRestore(restore_args=plain)
        found = reader.restore(checkpoint / "state", args=arguments)
    return {name: found[name] for name in ("params", "opt_state")}


def _train(case: Case, workdir: Path, *, cut_off: int | None) -> None:
    loop.train(
        loop.Job(task=_task(), feed=_feed(case, cut_off=cut_off)),
        run=RunConfig(
            steps=STEPS,
            batch_size=BATCH,
            log_every=1,
            checkpoint_every=3,
            checkpoint_minutes=0.0,
            eval_every=0,
        ),
        optimizer_config=OptimizerConfig(
            learning_rate=0.1,
            warmup_steps=2,
            weight_decay=0.01,
            max_bad_steps=case.limit,
            accumulate=case.accumulate,
        ),
        config={"model": {}},
        workdir=str(workdir),
    )


def _feed(case: Case, *, cut_off: int | None) -> loop.Feed:
    def training(start: int) -> Iterator[dict]:
        for step in range(start, 1_000_000):
            if step == cut_off:
                raise CutOff
            random = np.random.default_rng(step)
            x = random.normal(size=(BATCH, WIDTH)).astype(np.float32)
            fault = np.zeros((BATCH, len(KINDS)), np.float32)
            if step in case.faults:
                fault[random.integers(BATCH), case.faults[step]] = 1
            yield {"x": x, "y": x.sum(1), "fault": fault}

    def evaluation() -> Iterator[dict]:
        x = np.ones((BATCH, WIDTH), np.float32)
        yield {"x": x, "y": x.sum(1), "valid": np.ones(BATCH, bool)}

    return loop.Feed(training=training, evaluation=evaluation, metrics=dict)


def _task() -> Task:
    def loss(params, batch, key, step):
        del key, step
        kernel = params["head"]["kernel"][:, 0]
        fault = batch["fault"].max(0)
        broken = jnp.where(fault[0] > 0, jnp.nan, jnp.where(fault[1] > 0, jnp.inf, 1.0))
        total = (jnp.square((batch["x"] * broken) @ kernel - batch["y"]) * batch["valid"]).sum()
        total += jnp.where(fault[2] > 0, jnp.nan, 0.0) + jnp.where(fault[3] > 0, jnp.inf, 0.0)
        total += _poisoned(kernel, nan=fault[4], huge=fault[5])
        return total, {"loss": total, "weight": batch["valid"].sum()}

    def evaluate(params, frozen, batch):
        del frozen
        error = jnp.square(batch["x"] @ params["head"]["kernel"][:, 0] - batch["y"])
        valid = batch["valid"].astype(jnp.float32)
        return {"loss": (error * valid).sum(), "weight": valid.sum()}

    return Task(
        init=lambda key: {"head": {"kernel": jax.random.normal(key, (WIDTH, 1))}},
        prepare=lambda frozen, batch, key: batch | {"valid": jnp.ones(batch["x"].shape[0])},
        loss=loss,
        evaluate=evaluate,
        metrics=lambda sums: {"loss": sums["loss"] / sums["weight"]},
        frozen={},
        flops_per_image=1.0,
    )


def _poisoned(kernel: jax.Array, *, nan: jax.Array, huge: jax.Array) -> jax.Array:
    """0, whose gradient is NaN or overflows where `nan` or `huge` is 1, and 0 elsewhere."""
    root = jnp.sqrt(0 * jnp.square(kernel).sum() + 1 - nan) - (1 - nan)
    return root + huge * 1e30 * (kernel - jax.lax.stop_gradient(kernel)).sum()
