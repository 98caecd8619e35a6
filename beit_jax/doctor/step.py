"""A training step: compiled, run a few times, and compared with what images can be read."""

import math
import statistics
import tempfile
import time

import jax
import numpy as np

from beit_jax.doctor import images, machine
from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, skipped, warning, wrong
from beit_jax.training import checkpoint, optim, sharding, start, state
from beit_jax.types import Batch

# FLOPs of a step that a CPU is asked to do: about half a minute. Beyond it a small batch is timed.
_AFFORDABLE = 2e12
_PATIENCE = 30.0  # seconds for steps beyond the second
_SHORT = 15  # minutes of reading that are not worth more machines
_LONG = 30  # days of a run that are worth a word
_OFF = 0.3  # share of ln(classes) by which a fresh model's loss may differ from it


def check_step(context: Context) -> list[Finding]:
    """Compiles the job's step and runs it: memory, time, and the loss at the start."""
    config = context.config
    if machine.least_bytes(context) * _shared() > (machine.device_bytes() or math.inf):
        return [skipped("no step is run, since it does not fit into memory")]
    flops = context.small_parts.task.flops_per_image * config.run.batch_size
    affordable = jax.default_backend() != "cpu" or flops < _AFFORDABLE
    parts = context.parts if affordable else context.small_parts
    size = config.run.batch_size if affordable else context.small_batch
    small = size == context.small_batch
    host = context.batch if small else next(iter(parts.feed.training(0)))
    batch = sharding.to_devices(host, context.mesh)
    optimizer = optim.adamw(config.optimizer)
    jitted = state.jitted_step(
        parts.task,
        state=context.shapes,
        config=config.optimizer,
        optimizer=optimizer,
        steps=config.run.steps,
        seed=config.run.seed,
        mesh=context.mesh,
    )
    frozen = sharding.replicate(parts.task.frozen, context.mesh)
    began = time.perf_counter()
    compiled = jitted.lower(context.shapes, frozen, batch).compile()
    compiling = time.perf_counter() - began
    findings = _memory(compiled, context=context) if affordable else []
    if any(finding.level == "wrong" for finding in findings):
        return findings
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, run=config.run, config=config)
        try:
            train_state = start.restore_or_init(
                parts.task, optimizer, checkpoints, shapes=context.shapes, run=config.run
            )
        finally:
            checkpoints.close()
    seconds, losses = _run(compiled, train_state, frozen, batch, steps=context.steps)
    step_seconds = statistics.median(seconds) * config.run.batch_size / size
    context.step_seconds = step_seconds
    note = "" if affordable else f", estimated from a batch of {size}"
    findings += duration(step_seconds, steps=config.run.steps, note=note, compiling=compiling)
    fresh = 0 if config.run.init_from else parts.classes
    return findings + first_loss(losses, classes=fresh)


def _shared() -> int:
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1


def _memory(compiled: jax.stages.Compiled, *, context: Context) -> list[Finding]:
    """What the compiler says that the step takes."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return []
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    return machine.fits(needed, what="as it is compiled", context=context)


def _run(
    compiled: jax.stages.Compiled,
    train_state: state.TrainState,
    frozen: object,
    batch: Batch,
    *,
    steps: int,
) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, and the losses; slow steps are fewer."""
    seconds: list[float] = []
    losses: list[float] = []
    while len(seconds) < 2 or (len(seconds) < steps and sum(seconds) < _PATIENCE):
        began = time.perf_counter()
        train_state, metrics = compiled(train_state, frozen, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    return seconds[1:], losses


def duration(seconds: float, *, steps: int, note: str, compiling: float) -> list[Finding]:
    """How long the run takes."""
    total = seconds * steps
    what = (
        f"a step takes {_number(seconds)} s{note}; {steps:,} steps, {_long(total)}; compiled in"
        f" {compiling:.0f} s"
    )
    if total > _LONG * 86400:
        fix = "take more or faster devices: main.py --plan=v4-128 says what a TPU slice would need"
        return [warning(what, fix)]
    return [ok(what)]


def _long(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{_number(seconds / length)} {unit}"
    return f"{seconds:.0f} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def first_loss(losses: list[float], *, classes: int) -> list[Finding]:
    """The losses of the first steps: finite, and the first one that of guessing.

    Args:
      losses: in nats.
      classes: that a fresh model tells apart; 0: its first loss is not known.
    """
    if not np.isfinite(losses).all():
        return [
            wrong(
                f"the loss is {losses} in the first steps",
                "a lower config.optimizer.learning_rate, config.model.dtype='float32', or other"
                " weights to start from",
            )
        ]
    if classes < 2:
        return [ok(f"the loss is finite: {losses[0]:.3f}")]
    expected = math.log(classes)
    what = f"the loss begins at {losses[0]:.3f}, guessing costs ln({classes}) = {expected:.3f}"
    if abs(losses[0] - expected) > _OFF * expected:
        fix = "look at the head's initial values and the labels: a fresh model should guess"
        return [warning(what, fix)]
    return [ok(what)]


def check_input(context: Context) -> list[Finding]:
    """Images are read at least as fast as the step takes them."""
    batches = iter(context.small_parts.feed.training(0))
    read = images.reading_speed(batches, seconds=context.seconds, clock=time.perf_counter)
    if context.step_seconds is None:
        return [ok(f"{read:.0f} images/s are read; no step was timed to compare with")]
    run = context.config.run
    return enough(
        read,
        needed=run.batch_size / context.step_seconds,
        minutes=run.steps * run.batch_size / read / 60,
    )


def enough(read: float, *, needed: float, minutes: float) -> list[Finding]:
    """Compares images that are read with what the step takes.

    Where the step runs on the CPUs that also decode, both slow each other down.

    Args:
      read, needed: images per second.
      minutes: that the whole run reads for; a run of a few minutes may wait for its images.
    """
    what = f"{read:.0f} images/s are read, {needed:.0f} needed"
    fix = (
        "store smaller images with `beit-jax prepare`, let other machines decode with `beit-jax"
        " service`, set config.data.augment.fidelity='fast', or take a machine with more cores"
    )
    if read >= 1.2 * needed:
        return [ok(what)]
    if minutes < _SHORT:
        return [ok(f"{what}; the run reads for {minutes:.1f} minutes in all")]
    if read < needed:
        return [wrong(f"data-starved: {what}", fix)]
    return [warning(f"{what}: little to spare", fix)]
