"""Nothing that is not finite is saved, kept as the best, or reported as the end of a run.

A step looks at its loss and its gradients, not at the parameters that come of them, which would
cost every step a pass over memory. They are looked at here before each checkpoint instead, so that
the last one is always sound.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from beit_jax.config import RunError
from beit_jax.training import sharding
from beit_jax.training.optim import path_name
from beit_jax.training.state import TrainState
from beit_jax.types import PyTree

_NAMED = 3


class NonFiniteError(RunError):
    """Updates, parameters or results are not finite."""


def check_step(step: int, step_metrics: Mapping[str, jax.Array], *, limit: int) -> None:
    """Waits for a step's metrics; raises NonFiniteError after `limit` skipped updates in a row.

    The parameters are those of the last good update, so checkpoints up to here are sound; none is
    written after this.
    """
    in_row = int(step_metrics["skipped_in_row"])
    if in_row:
        logging.warning(
            "step %d: loss %s, gradient norm %s: the update is skipped (%d in a row)",
            step,
            float(step_metrics["loss"]),
            float(step_metrics["grad_norm"]),
            in_row,
        )
    if in_row >= limit:
        raise NonFiniteError(
            f"step {step}: {in_row} updates in a row were not finite"
            f" (config.optimizer.max_bad_steps); loss {float(step_metrics['loss'])},"
            f" gradient norm {float(step_metrics['grad_norm'])}."
            " The last checkpoint is from before and sound."
        )


def check_state(state: TrainState, *, mesh: Mesh, saved: int | None) -> None:
    """Raises NonFiniteError where an array of the train state holds NaN or infinities.

    Args:
      state: its arrays, on devices.
      mesh: of their shardings.
      saved: the newest checkpoint's step, for the message; None where there is none.
    """
    parts = ("params", "variables", "ema", "opt_state")
    bad = not_finite({name: getattr(state, name) for name in parts}, mesh=mesh)
    if not bad:
        return
    rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    where = (
        "there is no checkpoint" if saved is None else f"the checkpoint of step {saved} is sound"
    )
    raise NonFiniteError(
        f"step {int(state.step)}: {', '.join(bad[:_NAMED])}{rest} hold NaN or infinities, although"
        f" loss and gradients were finite; this is not saved, and {where}. Look at"
        " config.optimizer: learning rate, weight decay, betas and epsilon"
    )


def not_finite(tree: PyTree, *, mesh: Mesh) -> list[str]:
    """The names of a tree's floating arrays that hold NaN or infinities."""
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not leaves:
        return []
    finite = np.asarray(_all_finite(mesh)(list(leaves.values())))
    return [name for name, good in zip(leaves, finite, strict=True) if not good]


@functools.cache
def _all_finite(mesh: Mesh) -> "jax.stages.Wrapped":
    return jax.jit(
        lambda arrays: jnp.stack([jnp.isfinite(array).all() for array in arrays]),
        out_shardings=NamedSharding(mesh, sharding.REPLICATED),
    )


def check_evaluation(evaluation: Mapping[str, float], *, step: int) -> None:
    """Raises NonFiniteError where a held-out result is NaN or infinite."""
    bad = [f"{name} is {value}" for name, value in evaluation.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"step {step}: held-out {', '.join(bad)}; the last checkpoint's parameters are finite"
        )


def check_updates(state: TrainState, *, limit: int) -> None:
    """Raises NonFiniteError where no update of a short run was finite.

    Args:
      state: at the end of the run.
      limit: `max_bad_steps`, which ends longer runs.
    """
    in_row, steps = int(state.skipped_in_row), int(state.step)
    if in_row and in_row >= min(limit, steps):
        raise NonFiniteError(
            f"step {steps}: none of the last {in_row} updates was finite, so nothing was learnt"
        )
