"""AdamW with BEiT's no-decay list and its learning-rate schedule.

Paper table 12; official optim_factory.py and utils.py.

The transformation returned by `adamw` leaves out the learning rate: the train step multiplies by
it, so that it follows the step counter even where a non-finite update is skipped (as the official
script's does when the loss scaler skips one).
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beit_jax.config import OptimizerConfig

# First match wins. A path has its names joined by "/". Everything 1-D is free of decay in the
# official code (optim_factory.py:65); here stacked blocks give those an extra axis, so that names
# decide. Easy to miss: mask_token and the relative-position tables ARE decayed.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(bias|scale)$", False),
    (r"gamma_[12]$", False),
    (r"(cls_token|pos_embed)$", False),
    (r"mask_token$", True),
    (r"relative_position_bias/table$", True),
    (r"kernel$", True),
    (r"codebook$", True),
)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path from `jax.tree_util` as names joined by "/"."""
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
        for entry in path
    )


def by_rules(tree: Any, rules: tuple[tuple[str, Any], ...], *, what: str) -> Any:
    """Gives every leaf the value of the first rule whose pattern is found in its path.

    Raises:
      ValueError: some leaves have no rule; all of them are named.
    """
    missing = []

    def value(path, _):
        name = path_name(path)
        for pattern, result in rules:
            if re.search(rf"(^|/){pattern}", name):
                return result
        missing.append(name)
        return None

    result = jax.tree_util.tree_map_with_path(value, tree)
    if missing:
        raise ValueError(f"no {what} rule for these parameters: {', '.join(missing)}")
    return result


def decay_mask(params: Any) -> Any:
    """Booleans in the shape of `params`: whether weight decay applies to each."""
    return by_rules(params, DECAY_RULES, what="weight-decay")


def learning_rate(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The official schedule (utils.py:383-400) as a function of the step, counted from 0.

    Warm-up is `linspace(0, peak, warmup_steps)` with both ends: step 0 has rate exactly 0 and the
    last warm-up step the peak. Then half a cosine of `steps - warmup_steps` samples, which starts
    at the peak again and ends just above the minimum.
    """
    peak, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    cosine_steps = max(steps - warmup, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = peak * step / max(warmup - 1, 1)
        angle = jnp.pi * (step - warmup) / cosine_steps
        falling = low + 0.5 * (peak - low) * (1.0 + jnp.cos(angle))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction plus decoupled decay, to be multiplied by minus the learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def clip_by_norm(gradients: Any, *, norm: jax.Array, limit: float | None) -> Any:
    """Scales gradients so that their global norm is at most `limit` (torch's clip_grad_norm_)."""
    if limit is None:
        return gradients
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, gradients)
