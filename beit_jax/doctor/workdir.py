"""The run's directory: it can be written to, is this run's, and has room for the checkpoints."""

import contextlib
import os
import tempfile

from etils import epath

from beit_jax import storage
from beit_jax.config import ConfigError
from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, skipped, warning, wrong
from beit_jax.doctor.parts import JOBS
from beit_jax.json_text import read_json_object
from beit_jax.training import room, run_directory, run_lock, same_run, start
from beit_jax.weights import native

_OTHER = "choose another --workdir"


def check_workdir(context: Context) -> list[Finding]:
    """The directory can be written to, and holds nothing or this run."""
    workdir = context.workdir
    run_directory.check_path(workdir)
    if "://" in workdir:
        return [skipped(f"{workdir} is not written to before the run")]
    folder = _nearest(workdir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        text = f"--workdir: {folder} can't be written to: {error.strerror}"
        return [wrong(text, f"{_OTHER}, or make room and permissions there")]
    if not os.path.isdir(workdir):
        return [ok(f"{workdir} can be made")]
    with run_lock.hold(workdir):  # another run's holds it off
        _check_foreign(workdir)
    return [ok(f"{workdir} can be written to")]


def check_run(context: Context) -> list[Finding]:
    """Checkpoints that are there were written with these settings."""
    workdir = context.workdir
    saved = same_run.recorded(workdir)
    if not saved:
        return [ok(f"{workdir} has no checkpoint: the run starts from the beginning")]
    config = context.config
    if hasattr(config, "classes") and config.task in JOBS:  # which the images complete
        config = context.small_parts.config
    same_run.check_settings(same_run.changes(saved, config), config, where=workdir)
    step = native.state_folder(workdir, name="checkpoint").parent.name
    return [ok(f"{workdir} is this run's: it goes on at step {step}")]


def _nearest(workdir: str) -> str:
    """The nearest folder above that exists."""
    folder = os.path.abspath(workdir)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _check_foreign(workdir: str) -> None:
    """Raises ConfigError for somebody else's files in the place of the run's; moves nothing."""
    for name, is_own in run_directory.OWN.items():
        path = epath.Path(workdir) / name
        run_directory.check_kind(path)
        if path.exists() and not is_own(read_json_object(path, finite=False)):
            raise ConfigError(f"--workdir: {path} was written by another program; {_OTHER}")


def check_room(context: Context) -> list[Finding]:
    """The disk has room for the checkpoints that are kept, and one that is being written."""
    run, workdir = context.config.run, context.workdir
    free = storage.free_bytes(workdir)
    if free is None:
        return [skipped("how much room there is, is not known")]
    one = room.tree_bytes(context.shapes)
    task = context.small_parts.task
    shapes = context.shapes
    best = room.tree_bytes((shapes.params, shapes.variables)) if task.best else 0
    needed = room.needed_bytes(state=one, best=best, kept=0, best_kept=0, run=run, step=0)
    kept = 0
    with contextlib.suppress(OSError):
        checkpoints = epath.Path(workdir) / "checkpoints"
        kept = sum(native.is_step(entry.name) for entry in checkpoints.iterdir())
    needed = max(needed - kept * one, one)
    what = (
        f"{storage.size(free)} free; checkpoints take {storage.size(needed)},"
        f" {storage.size(one)} each"
    )
    fix = (
        "make room, choose another disk with --workdir, or keep fewer: config.run.keep_checkpoints"
    )
    if free < needed:
        return [wrong(what, fix)]
    if free < 1.2 * needed:
        return [warning(what, fix)]
    return [ok(what)]


def check_weights(context: Context) -> list[Finding]:
    """The weights to start from exist and state the job's facts (normalisation, say)."""
    run = context.config.run
    if context.weights_come:
        return [ok("an earlier job of this config writes the weights to start from")]
    if not run.init_from:
        return [ok("starts from fresh parameters")]
    start.source_facts(context.config, run=run, workdir=context.workdir)
    return [ok(f"{run.init_from} states nothing that differs from the settings")]
