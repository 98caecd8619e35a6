"""From settings to a train state on devices: the mesh, shapes, and what a run starts from."""

import functools
import hashlib

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from beit_jax.config import OptimizerConfig, RunConfig, to_dict
from beit_jax.config.facts import comparable
from beit_jax.training import checkpoint, optim, sharding, state
from beit_jax.training.state import Task, TrainState
from beit_jax.types import JsonObject, PyTree
from beit_jax.weights import facts, native


def open_mesh(*, run: RunConfig, accumulate: int) -> Mesh:
    """The mesh of all devices; raises ConfigError where the batch does not divide over it."""
    mesh = sharding.make_mesh(fsdp=run.fsdp)
    sharding.check_batch(
        run.batch_size, accumulate=accumulate, mesh=mesh, processes=jax.process_count()
    )
    return mesh


def source_facts(
    config: checkpoint.Settings, *, run: RunConfig, workdir: str
) -> facts.SourceFacts | None:
    """What the source of a warm start says of itself, compared with the job's settings.

    To be called before anything is computed or written.

    Args:
      config: the job's, which states the facts of its model (`config/facts.py`).
      run: `init_from`, and which facts may differ.
      workdir: the run's directory.

    Returns:
      None where nothing is compared: a run that continues from its own checkpoint is no warm start,
      and a job may have no facts.

    Raises:
      ConfigError: facts differ, or there is no such checkpoint.
    """
    target = _plain(config)
    if not run.init_from or not comparable(target, target) or native.is_checkpoint(workdir):
        return None
    found = facts.stated(run.init_from, allow_unused=run.init_allow_unused)
    facts.check(found, target, source=run.init_from, allow_different=run.init_allow_different)
    return found


def check_data(
    found: facts.SourceFacts | None, config: checkpoint.Settings, *, run: RunConfig
) -> None:
    """Compares what is known of the job since its images are open; nothing where `found` is None.

    Args:
      found: from `source_facts`.
      config: the settings as the job has completed them.
      run: see `source_facts`.

    Raises:
      ConfigError: facts differ.
    """
    if found is not None:
        facts.check(
            found,
            _plain(config),
            source=run.init_from,
            allow_different=run.init_allow_different,
            from_data=True,
        )


def _plain(config: checkpoint.Settings) -> JsonObject:
    return config if isinstance(config, dict) else to_dict(config)


def restore_or_init(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    checkpoints: checkpoint.Checkpoints,
    *,
    shapes: TrainState,
    run: RunConfig,
) -> TrainState:
    """The state to start from; the order of precedence is `checkpoint`'s module docstring."""
    restored = checkpoints.restore(shapes)
    if restored is not None:
        text = "evaluating step %d of %d" if checkpoints.read_only else "resumed at step %d of %d"
        logging.info(text, int(restored.step), run.steps)
        return restored
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    if run.init_from:
        params = checkpoint.restore_params(
            run.init_from,
            shapes=shapes.params,
            fresh=lambda: jax.jit(task.init, out_shardings=shardings.params)(
                jax.random.key(run.seed)
            ),
            # What is only evaluated must be there: a head that was just drawn has no figures.
            allow_missing=task.only_for_training
            if checkpoints.read_only
            else run.init_allow_missing,
            allow_unused=run.init_allow_unused,
        )
        logging.info("parameters from %s", run.init_from)
        variables = checkpoint.restore_variables(
            run.init_from,
            shapes=shapes.variables,
            fresh=lambda: jax.jit(
                functools.partial(state.init_variables, task), out_shardings=shardings.variables
            )(jax.random.key(run.seed)),
            allow_unused=run.init_allow_unused,
        )
        fresh = functools.partial(
            state.state_from_params, optimizer=optimizer, average=bool(shapes.ema)
        )
        return jax.jit(fresh, out_shardings=shardings)(params, variables=variables)
    fresh = functools.partial(state.init_state, task, optimizer, average=bool(shapes.ema))
    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(run.seed))


def state_shapes(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the train state; nothing is computed."""
    average = optimizer_config.ema_decay is not None
    return state.state_shapes(task, optimizer, mesh, average=average)


def digest(tree: PyTree) -> str:
    """Hash of all arrays on this host, with their names and dtypes."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        hashed.update(f"{optim.path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()[:12]


def log_size(shapes: TrainState, mesh: Mesh) -> None:
    """Logs the number of parameters and the devices."""
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))
    device = jax.devices()[0]
    logging.info(
        "%s parameters; %d × %s in a mesh of %s",
        f"{count:,}",
        jax.device_count(),
        device.device_kind,
        " × ".join(f"{name} {size}" for name, size in mesh.shape.items()),
    )
