"""AdamW with BEiT's no-decay list, its learning-rate schedule and layer-wise rates.

Paper tables 12 and 13; official optim_factory.py and utils.py.

The transformation returned by `adamw` leaves out the learning rate: the train step multiplies by
it, so that it follows the step counter even where a non-finite update is skipped (as the official
script's does when the loss scaler skips one).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beit_jax.config import OptimizerConfig

# First match wins. A path has its names joined by "/". Everything 1-D is free of decay in the
# official code (optim_factory.py:65); here stacked blocks give those an extra axis, so that names
# decide. Easy to miss: mask_token and the relative-position tables ARE decayed.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"probe/(kernel|bias)$", True),  # one optimizer group in run_linear_eval.py: bias too
    (r"(bias|scale)$", False),
    (r"gamma_[12]$", False),
    (r"(cls_token|pos_embed)$", False),
    (r"mask_token$", True),
    (r"relative_position_bias/table$", True),
    (r"kernel$", True),
    (r"codebook$", True),
)

# How far from the head a parameter counts as being (optim_factory.py:33-55). Easy to miss: a
# relative-position table that all blocks share goes with the head.
EMBEDDINGS, BLOCKS, HEAD = "embeddings", "blocks", "head"
LAYER_RULES: tuple[tuple[str, str], ...] = (
    (r"encoder/(cls_token|mask_token|pos_embed)$", EMBEDDINGS),
    (r"encoder/patch_embed/(kernel|bias)$", EMBEDDINGS),
    (r"encoder/blocks/", BLOCKS),
    (r"encoder/relative_position_bias/table$", HEAD),
    (r"(encoder/norm|fc_norm)/(scale|bias)$", HEAD),
    (r"(head|lm_head|probe)/(kernel|bias)$", HEAD),
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


def decay_mask(params: Any, *, relative_positions: bool = True) -> Any:
    """Booleans in the shape of `params`: whether weight decay applies to each.

    Args:
      params: nested dict of arrays or shapes.
      relative_positions: whether it applies to relative-position tables (official
        `--disable_weight_decay_on_rel_pos_bias`).
    """
    tables = ((r"relative_position_bias/table$", relative_positions),)
    return by_rules(params, tables + DECAY_RULES, what="weight-decay")


def layer_multipliers(params: Any, *, decay: float, layers: int) -> Any:
    """What the learning rate of each parameter is multiplied by (layer-wise decay).

    With L layers: 1 for head, final norms and a shared relative-position table, decay^(L - i) for
    block i counted from 0, decay^(L + 1) for the embeddings.

    Args:
      params: nested dict of arrays or shapes, the encoder's under "encoder".
      decay: rate of a layer over that of the layer behind it.
      layers: L, the blocks on the leading axis of everything under `encoder/blocks`.

    Returns:
      float32 arrays in the structure of `params` that broadcast against them: `[l, 1, ...]` for
      blocks, scalars for the rest.

    Raises:
      ValueError: parameters without a rule, or blocks that are not `layers`; all are named.
    """
    wrong = []

    def multiplier(path: tuple[Any, ...], leaf: Any, place: str) -> np.ndarray:
        if place != BLOCKS:
            return np.asarray(decay ** (layers + 1) if place == EMBEDDINGS else 1.0, np.float32)
        if leaf.shape[:1] != (layers,):
            wrong.append(f"{path_name(path)} {leaf.shape}")
        powers = decay ** np.arange(layers, 0, -1, dtype=np.float64)
        return powers.astype(np.float32).reshape(layers, *[1] * (len(leaf.shape) - 1))

    places = by_rules(params, LAYER_RULES, what="layer-decay")
    multipliers = jax.tree_util.tree_map_with_path(multiplier, params, places)
    if wrong:
        raise ValueError(f"not {layers} blocks on the leading axis of: {', '.join(wrong)}")
    return multipliers


def _count_layers(params: Any) -> int:
    """Blocks on the leading axis of what is stacked; 0 where nothing is."""
    places = by_rules(params, LAYER_RULES, what="layer-decay")
    sizes = [
        leaf.shape[0]
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
        if place == BLOCKS
    ]
    return max(sizes, default=0)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's layer multiplier."""

    def scale(tree: Any) -> Any:
        multipliers = layer_multipliers(tree, decay=decay, layers=_count_layers(tree))
        return jax.tree.map(lambda leaf, multiplier: leaf * multiplier, tree, multipliers)

    def init(params: Any) -> optax.EmptyState:
        layer_multipliers(params, decay=decay, layers=_count_layers(params))  # complains early
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params
        return scale(updates), state

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The official schedule (utils.py:383-400) as a function of the step, counted from 0.

    Warm-up is `linspace(0, peak, warmup_steps)` with both ends: step 0 has rate exactly 0 and the
    last warm-up step the peak. Then half a cosine of `steps - warmup_steps` samples, which starts
    at the peak again and ends just above the minimum.

    With `hold_steps` the rate is that of the last step divisible by it: with an epoch's steps and
    no warm-up, PyTorch's CosineAnnealingLR stepped once an epoch.
    """
    peak, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    cosine_steps = max(steps - warmup, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step) // config.hold_steps * config.hold_steps
        step = step.astype(jnp.float32)
        rising = peak * step / max(warmup - 1, 1)
        angle = jnp.pi * (step - warmup) / cosine_steps
        falling = low + 0.5 * (peak - low) * (1.0 + jnp.cos(angle))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam's direction plus decoupled decay, to be multiplied by minus the learning rate.

    With `layer_decay` under 1 both are scaled layer by layer: AdamW decays by a group's rate.

    `update` takes one argument more than optax', `finite`: where it is false the state stays as it
    is, and the directions mean nothing.
    """
    decayed = functools.partial(decay_mask, relative_positions=config.decay_relative_positions)
    steps = [
        _scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    ]
    if config.layer_decay < 1:
        steps.append(_scale_by_layer(config.layer_decay))
    return optax.chain(*steps)


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which keeps its state where an update is not finite.

    Old or new is chosen in the expression that makes the new moment: no pass over memory more.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Any = True, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        count = optax.safe_increment(state.count)

        def moment(decay: float, power: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
            return lambda old, g: jnp.where(finite, decay * old + (1 - decay) * g**power, old)

        mu = jax.tree.map(moment(b1, 1), state.mu, updates)
        nu = jax.tree.map(moment(b2, 2), state.nu, updates)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)

        directions = jax.tree.map(direction, mu, nu)
        count = jnp.where(finite, count, state.count)
        return directions, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    init = optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init
    return optax.GradientTransformationExtraArgs(init, update)


def clip_factor(norm: jax.Array, *, limit: float | None) -> jax.Array | float:
    """What gradients of this global norm are multiplied by (torch's clip_grad_norm_).

    Args:
      norm: of all gradients together.
      limit: what it may be at most; None: anything.
    """
    return 1.0 if limit is None else jnp.minimum(1.0, limit / (norm + 1e-6))
