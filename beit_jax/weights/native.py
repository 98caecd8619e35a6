"""This project's own ("native") checkpoints: their parameters and saved config.

A checkpoint is a folder `{state, config}` that Orbax wrote: `<workdir>/checkpoints/<step>` of a
run, with the whole train state; or one written here, with nothing but parameters. Either is read on
any number of devices, whatever number wrote it.
"""

import contextlib
import json
from collections.abc import Iterator
from logging import LogRecord
from types import ModuleType

import jax
import numpy as np
from absl import logging
from etils import epath

from beit_jax.config import ConfigError
from beit_jax.types import JsonObject, Params

# Names in a checkpoint's folder, Orbax' marks included.
CONTENT = ("state", "config", "_CHECKPOINT_METADATA", "commit_success.txt")


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
def _quiet() -> Iterator[None]:
    """Hides Orbax' warning of metadata that it then finds in another file.

    That message alone: meanwhile another thread may have something to say of the first batch.
    """

    def keep(record: LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger = logging.get_absl_logger()
    logger.addFilter(keep)
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
            if entry.name.isdigit() and _is_one(entry)
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
    """
    folder = state_folder(source, name=name)
    with _quiet(), _orbax().StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder)
    return metadata.item_metadata.tree.get(part, {})


def saved_config(source: str, *, name: str = "checkpoint") -> JsonObject:
    """The resolved config that a checkpoint was written with."""
    folder = state_folder(source, name=name).parent / "config"
    (path,) = [path for path in folder.iterdir() if path.name == "metadata"]
    return json.loads(path.read_text())


def saved_metrics(source: str) -> JsonObject:
    """The run's `summary.json`; else the last numbers in `metrics.jsonl`; else nothing."""
    here = epath.Path(source)
    for folder in (here, here.parent.parent):  # a workdir, or <workdir>/checkpoints/<step>
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        if (folder / "metrics.jsonl").exists():
            numbers: JsonObject = {}
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                try:
                    numbers |= json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
            return numbers
    return {}


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
      ConfigError: no checkpoint there.
    """
    folder = state_folder(source, name=name)
    ocp = _orbax()
    if shapes is None:
        item = saved_params_shapes(source, name=name, part=part)
        item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), item)
        # Without the sharding file, which names devices that this machine may not have.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    else:
        item = shapes
        restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
    with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item={part: item},
                restore_args={part: restore_args},
                partial_restore=True,
            ),
        )
    return restored[part]


def write_params(path: str, params: Params, *, config: JsonObject) -> None:
    """Writes a checkpoint of parameters alone, good for `config.run.init_from` and `export`.

    Args:
      path: the folder to make, local or gs://; a checkpoint that is there is replaced.
      params: nested dict of arrays.
      config: what `description.describe` needs, and anything else worth keeping.

    Raises:
      ConfigError: the folder holds something else, which would be lost.
    """
    ocp = _orbax()
    target = epath.Path(path) if "://" in path else epath.Path(path).absolute()
    if target.exists():
        others = [entry.name for entry in target.iterdir() if entry.name not in CONTENT]
        if others:
            raise ConfigError(f"{path}: holds other files ({others[0]}, ...); choose a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            target,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"params": params}), config=ocp.args.JsonSave(config)
            ),
            force=True,
        )
