"""This project's own ("native") checkpoints: their parameters and saved config.

A checkpoint is a folder `{state, config, digests}` that Orbax wrote: `<workdir>/checkpoints/<step>`
of a run, with the whole train state; or one written here, with nothing but parameters. Either is
read on any number of devices, whatever number wrote it, and compared with its digests, which those
of older versions lack. What is damaged is refused: only a run falls back to another checkpoint.
"""

import contextlib
import glob
import math
import os
import shutil
import stat
from collections.abc import Iterator
from logging import LogRecord
from types import ModuleType

import jax
import numpy as np
from absl import logging
from etils import epath

from beit_jax import metrics_file, storage
from beit_jax.config import ConfigError
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.types import JsonObject, Params, PyTree, Variables
from beit_jax.weights import digests

_LARGEST_INDEX = 1 << 30  # bytes of a file that lists others; thousands of hosts have 1 MB
_MOST_NUMBERS = 10**11  # parameters; a hundred times those of the largest BEiT
_REASON = 160  # characters of another library's message
# Numbers of a summary or a log that say nothing of the parameters.
_NO_FIGURES = (
    *("step", "steps", "seconds", "seconds_left", "data_wait_share", "mfu", "skipped"),
    *("images_per_second", "images_per_second_per_chip", "skipped_in_row"),
)
# Names in a checkpoint's folder, Orbax' marks included.
CONTENT = ("state", "config", digests.ITEM, "_CHECKPOINT_METADATA", "commit_success.txt")


def _orbax() -> ModuleType:
    """Orbax, imported on first use: reading foreign files must not need it."""
    try:
        import orbax.checkpoint
    except ImportError:
        raise ConfigError(
            "a checkpoint of beit_jax is read and written by Orbax, which is not installed:"
            " pip install beit-jax[train]"
        ) from None
    return orbax.checkpoint


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Hides Orbax' warning of metadata that it then finds in another file.

    That message alone: meanwhile another thread may have something to say of the first batch. Also
    hides what TensorStore prints for each array that is read after another one turned out damaged.
    """

    def keep(record: LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger = logging.get_absl_logger()
    logger.addFilter(keep)
    storage.ignore_closed_loops()
    try:
        yield
    finally:
        logger.removeFilter(keep)


def is_checkpoint(source: str) -> bool:
    """Whether `source` is a native checkpoint or the directory of a run that has one."""
    try:
        state_folder(source, name="checkpoint")
    except ConfigError:
        return False
    return True


def is_step(name: str) -> bool:
    """Whether a run's checkpoint has this name: a number as Orbax writes it, not "007" or "²"."""
    return name.isascii() and name.isdecimal() and str(int(name[:20])) == name


def state_folder(source: str, *, name: str) -> epath.Path:
    """`<workdir>/checkpoints/<newest>/state` or `<checkpoint>/state`.

    Raises:
      ConfigError: neither is there; the message starts with `name`.
    """
    if "://" in source and not source.startswith("gs://"):
        raise ConfigError(f"{name}: no checkpoint in {source}: only local paths and gs:// are read")
    path = epath.Path(source)
    path = path if "://" in source else path.absolute()
    if _is_one(path):
        return path / "state"
    steps = []
    if (path / "checkpoints").exists():
        steps = [
            int(entry.name)
            for entry in (path / "checkpoints").iterdir()
            if is_step(entry.name) and _is_one(entry)
        ]
    if not steps:
        raise ConfigError(f"{name}: no checkpoint in {source}")
    return path / "checkpoints" / str(max(steps)) / "state"


def _is_one(folder: epath.Path) -> bool:
    # Both, since a folder of somebody else's may well have a `state` in it.
    return (folder / "state").exists() and (folder / "config").exists()


def saved_params_shapes(source: str, *, name: str = "checkpoint", part: str = "params") -> Params:
    """Names, shapes and dtypes of a checkpoint's parameters; the numbers stay on disk.

    With `part="variables"`, those of the state that no gradient trains; {} where there is none.

    Raises:
      ConfigError: no checkpoint there, or its metadata is damaged.
    """
    return saved_shapes(source, name=name).get(part, {})


def saved_shapes(source: str, *, name: str = "checkpoint") -> PyTree:
    """Names, shapes and dtypes of all that a checkpoint holds; the numbers stay on disk.

    Raises:
      ConfigError: no checkpoint there, or its metadata is damaged.
    """
    folder = state_folder(source, name=name)
    with _refusing_damage(folder.parent, name=name):
        with quiet_reads(), _orbax().StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder)
            _check("" if metadata.item_metadata is not None else "its metadata can't be read")
        shapes = metadata.item_metadata.tree
        # Asked before anything is allocated: what is not written reads as zeros, so that a
        # checkpoint of a few bytes may say that it has any size.
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        _check("" if size <= _MOST_NUMBERS else f"it says that it holds {size:.3g} numbers")
        stored = digests.read(folder.parent)
        _check(digests.shapes_problem(stored, shapes))
        return shapes


def saved_config(source: str, *, name: str = "checkpoint") -> JsonObject:
    """The resolved config that a checkpoint was written with.

    Raises:
      ConfigError: no checkpoint there, or its config is damaged.
    """
    folder = state_folder(source, name=name).parent
    with _refusing_damage(folder, name=name):
        config = read_json_object(folder / "config" / "metadata", finite=False)
        _check(digests.config_problem(digests.read(folder), config))
        return config


def _check(problem: str) -> None:
    if problem:
        raise ValueError(problem)


def check_files(checkpoint: epath.Path) -> None:
    """Raises ValueError for files that TensorStore would wait for, or end the process over."""
    if "://" in str(checkpoint):
        return
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            found = os.stat(os.path.join(folder, name))
            _check("" if stat.S_ISREG(found.st_mode) else f"{name} is not a regular file")
            is_read_whole = name.startswith(("manifest", "_", "metadata"))
            too_large = is_read_whole and found.st_size > _LARGEST_INDEX
            _check(f"{name} has {found.st_size} bytes" if too_large else "")


@contextlib.contextmanager
def _refusing_damage(checkpoint: epath.Path, *, name: str) -> Iterator[None]:
    """Whatever reading a checkpoint raises becomes one line, which names others beside it."""
    try:
        check_files(checkpoint)
        yield
    except JsonError as error:
        raise ConfigError(f"{name}: {error}{_others(checkpoint)}") from error
    except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):  # the last: a device is full
        raise
    except Exception as error:  # Orbax and TensorStore raise anything on damaged files
        if storage.passing(error):
            raise
        if not checkpoint.exists():
            raise ConfigError(
                f"{name}: {checkpoint} was deleted while it was read (a run keeps its newest,"
                " config.run.keep_checkpoints); try again"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if len(lines[0]) <= _REASON else f"{lines[0][:_REASON]}..."
        raise ConfigError(
            f"{name}: {checkpoint} is damaged: {reason}{_others(checkpoint)}"
        ) from error


def _others(checkpoint: epath.Path) -> str:
    """Where the same run's other checkpoints are; it is for a person to choose one of them."""
    if checkpoint.parent.name != "checkpoints" or not is_step(checkpoint.name):
        return ""
    steps = [entry.name for entry in checkpoint.parent.iterdir() if is_step(entry.name)]
    others = sorted({int(step) for step in steps} - {int(checkpoint.name)})
    if not others:
        return "; there is no other checkpoint beside it"
    return f"; choose another: {checkpoint.parent}/{max(others)}"


def saved_metrics(source: str) -> JsonObject:
    """The numbers that a run reached at a checkpoint's step: "step", and what was logged there.

    Those of other steps, newer ones of the same run among them, are no figures of these parameters.

    Args:
      source: a checkpoint or a run's directory (its newest checkpoint is meant); what is neither
        has no numbers.
    """
    try:
        checkpoint = state_folder(source, name="checkpoint").parent
    except ConfigError:
        return {}
    if not is_step(checkpoint.name):
        return {}
    step, run = int(checkpoint.name), checkpoint.parent.parent
    numbers: JsonObject = {}
    if run.name == "best":
        run = run.parent
    elif (run / "summary.json").exists():
        try:
            summary = read_json_object(run / "summary.json", finite=False)
            numbers = summary if summary.get("steps") == step else {}
        except JsonError as error:
            logging.warning("no summary of the run, only its log: %s", error)
    if not numbers and (run / "metrics.jsonl").exists():
        for line in metrics_file.read(run / "metrics.jsonl"):
            numbers |= line if line["step"] == step else {}
    reached = {
        name: value
        for name, value in numbers.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in _NO_FIGURES
    }
    return {"step": step} | reached


def read_params(
    source: str,
    *,
    shapes: Params | None = None,
    name: str = "checkpoint",
    part: str = "params",
) -> Params:
    """Reads the parameters alone; an optimizer's moments stay on disk.

    Args:
      source: a checkpoint or a run's directory (its newest checkpoint is taken).
      shapes: `ShapeDtypeStruct`s with shardings, exactly the stored names and shapes, that the
        result gets. None gives NumPy arrays in this process' memory.
      name: the prefix of messages.
      part: "params", or "variables" for the state that no gradient trains.

    Raises:
      ConfigError: no checkpoint there, or it is damaged.
    """
    folder = state_folder(source, name=name)
    with _refusing_damage(folder.parent, name=name):
        stored = digests.read(folder.parent)
        params = _restore(folder, source=source, shapes=shapes, name=name, part=part)
        _check(digests.arrays_problem(stored, params, part=f"{part}/"))
        return params


def _restore(
    folder: epath.Path, *, source: str, shapes: Params | None, name: str, part: str
) -> Params:
    ocp = _orbax()
    if shapes is None:
        item = saved_params_shapes(source, name=name, part=part)
        item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), item)
        # Without the sharding file, which names devices that this machine may not have.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    else:
        item = shapes
        restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
    with quiet_reads(), ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item={part: item},
                restore_args={part: restore_args},
                partial_restore=True,
            ),
        )
    return restored[part]


def write_params(
    path: str, params: Params, *, config: JsonObject, variables: Variables | None = None
) -> None:
    """Writes a checkpoint without an optimizer, good for `config.run.init_from` and `export`.

    Args:
      path: the folder to make, local or gs://; a checkpoint that is there is replaced.
      params: nested dict of arrays.
      config: what `description.describe` needs, and anything else worth keeping.
      variables: nested dict of what no gradient trains; None or {} where there is nothing.

    Raises:
      ConfigError: the folder holds something else, which would be lost.
      StorageError: the disk is full or can't be written to; an old checkpoint is as it was.
    """
    ocp = _orbax()
    target = epath.Path(path) if "://" in path else epath.Path(path).absolute()
    if target.exists():
        others = [entry.name for entry in target.iterdir() if entry.name not in CONTENT]
        if others:
            raise ConfigError(f"{path}: holds other files ({others[0]}, ...); choose a new folder")
    # Orbax deletes what is there before it writes, so that a full disk would leave nothing.
    beside = "://" not in path and target.exists()
    written = target.parent / f"{target.name}.{os.getpid()}.new" if beside else target
    tree = {"params": params} | ({"variables": variables} if variables else {})
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    try:
        with (
            storage.writing(target, needed=size),
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpointer.save(
                written,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    config=ocp.args.JsonSave(config),
                    digests=ocp.args.JsonSave(digests.item(tree, config=config)),
                ),
                force=True,
            )
            if beside:
                shutil.rmtree(target)
                written.rename(target)
    except storage.StorageError:
        for half in target.parent.glob(f"{glob.escape(written.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(half, ignore_errors=True)
        raise
