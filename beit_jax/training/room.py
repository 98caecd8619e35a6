"""Room for checkpoints: looked at before a run starts, and said when a checkpoint found none."""

import contextlib
import errno
import math
import os
import shutil
import traceback
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from beit_jax.config import ConfigError, RunConfig, RunError
from beit_jax.storage import StorageError, explain, free_bytes, size
from beit_jax.training.state import TrainState
from beit_jax.types import PyTree
from beit_jax.weights import native

_FOLDER = "checkpoints"


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all arrays, or shapes, of a tree, wherever they lie."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def needed_bytes(
    *, state: int, best: int, kept: int, best_kept: int, run: RunConfig, step: int
) -> int:
    """The bytes that a run's checkpoints will take beyond those that are there.

    A checkpoint is deleted only when the next one is complete, so there is one more at times.

    Args:
      state: bytes of the train state.
      best: bytes of the parameters that are kept as the best; 0 where the job keeps none.
      kept: checkpoints that are there.
      best_kept: the same of the best parameters, 0 or 1.
      run: how many are kept, and when they are saved.
      step: where the run starts.
    """
    if step >= run.steps:
        return 0
    saves = 1  # at the end
    if run.checkpoint_minutes:
        saves = run.keep_checkpoints + 1
    elif run.checkpoint_every:
        saves = math.ceil(run.steps / run.checkpoint_every) - step // run.checkpoint_every
    # Those that are there go before more than the limit are; the one that is written is paid anew.
    more = min(saves, max(run.keep_checkpoints - kept, 0) + 1)
    best_more = (2 - best_kept) if best else 0
    return more * state + best_more * best


def check(shapes: TrainState, *, run: RunConfig, workdir: str, step: int, keeps_best: bool) -> None:
    """Compares the free bytes of the run's disk with what its checkpoints will take.

    Local disks only, by process 0. What a checkpoint takes is known from shapes; Orbax compresses,
    which gains little on trained numbers. A quota is not seen.

    Args:
      shapes: of the train state.
      run: how many checkpoints are kept, and when they are saved.
      workdir: the run's directory.
      step: where the run starts.
      keeps_best: whether the job keeps the best parameters.

    Raises:
      StorageError: there is no room for a single checkpoint.
    """
    free = None if "://" in workdir else free_bytes(workdir)
    if jax.process_index() != 0 or free is None:
        return
    one = tree_bytes(shapes)
    best = tree_bytes((shapes.params, shapes.variables)) if keeps_best else 0
    needed = needed_bytes(
        state=one,
        best=best,
        kept=_count(workdir),
        best_kept=_count(f"{workdir}/best"),
        run=run,
        step=step,
    )
    if needed and free < one:
        raise NoRoomError(workdir, one=one, free=free)
    tokens = _holes(f"{workdir}/token_cache")
    if free < needed + tokens:
        logging.warning(
            "%s: ITS DISK MAY BECOME FULL: the checkpoints of this run will take %s more (%s each,"
            " config.run.keep_checkpoints=%d and one that is being written)%s, and %s are free",
            workdir,
            size(needed),
            size(one),
            run.keep_checkpoints,
            f" and its token cache {size(tokens)}" if tokens else "",
            size(free),
        )


class NoRoomError(StorageError):
    """Not even one checkpoint fits; nothing was trained."""

    def __init__(self, workdir: str, *, one: int, free: int):

        self._text = f"{workdir}: no room for a checkpoint ({size(one)} needed, {size(free)} free)"
        super().__init__(errno.ENOSPC, path=workdir, needed=one)

    def _line(self) -> str:
        return self._text


def _count(folder: str) -> int:
    checkpoints = epath.Path(folder) / _FOLDER
    if not checkpoints.is_dir():
        return 0
    return sum(native.is_step(entry.name) for entry in checkpoints.iterdir())


def _holes(folder: str) -> int:
    """The bytes that files below a folder have been given without having taken them."""
    holes = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            found = entry.stat()
            holes += max(found.st_size - 512 * found.st_blocks, 0)
    return holes


@contextlib.contextmanager
def reported(workdir: str, *, state: PyTree) -> Iterator[None]:
    """Around a run: a disk's error says what a checkpoint needs, and leaves no half one behind.

    Args:
      workdir: the run's directory.
      state: what a checkpoint holds.

    Raises:
      StorageError: from whatever a library made of a disk's error. It ends the run even where the
        run was leaving, because then the last checkpoint is missing.
      RunError: the run's own error, where a disk's came on top of it when the run was closed.
    """
    needed = tree_bytes(state)
    try:
        yield
    except Exception as error:
        fault = explain(error)
        if fault is None:
            raise
        _remove_unfinished(workdir)
        saving = f"/{_FOLDER}/" in fault.path or (not fault.path and _of_orbax(error))
        if saving:
            path = fault.path or f"{workdir}/{_FOLDER}"
            fault = StorageError(fault.number, path=path, needed=needed)
        elif not fault.path:
            fault = StorageError(fault.number, path=workdir)
        first = _first(error)
        if isinstance(first, RunError | ConfigError) and not isinstance(first, StorageError):
            logging.error("and when the run was closed: %s", fault)
            raise first from None
        raise fault from error


def _of_orbax(error: BaseException) -> bool:
    """Whether an error was raised while Orbax was at work."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("orbax") for frame, _ in frames)


def _first(error: BaseException) -> BaseException:
    """The error that others were raised on top of, in `finally`."""
    while error.__context__ is not None and error.__cause__ is None:
        error = error.__context__
    return error


def _remove_unfinished(workdir: str) -> None:
    """Removes what a failed save has left, which takes room and is no checkpoint."""
    if "://" in workdir or jax.process_index() != 0:
        return
    for folder in (workdir, f"{workdir}/best"):
        with contextlib.suppress(OSError):
            for entry in (epath.Path(folder) / _FOLDER).iterdir():
                if "orbax-checkpoint-tmp" in entry.name:
                    shutil.rmtree(entry, ignore_errors=True)


def line(fault: StorageError, *, workdir: str) -> str:
    """An error that ends a run, what is safe, and how to go on, in one line.

    Args:
      fault: what happened.
      workdir: the run's directory.
    """
    text = str(fault if fault.path else StorageError(fault.number, path=workdir))
    step = _newest(fault.path, workdir=workdir)
    safe = (
        "there is no checkpoint yet" if step is None else f"the checkpoint at step {step} is whole"
    )
    return f"{text}; {safe}, and the same command continues once {fault.remedy()}"


def _newest(path: str, *, workdir: str) -> int | None:
    """The step of the newest checkpoint beside what failed: a run may hold others' runs."""
    folders = [workdir]
    if "://" not in workdir and path:
        inside = epath.Path(path)
        root = epath.Path(workdir).absolute()
        folders = [str(one) for one in inside.parents if one.is_relative_to(root)] + folders
    for folder in folders:
        with contextlib.suppress(Exception):  # a disk that fails may fail to be read, too
            return int(native.state_folder(folder, name="checkpoint").parent.name)
    return None
