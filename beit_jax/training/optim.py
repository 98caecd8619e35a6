"""AdamW with BEiT's no-decay list, its learning-rate schedule and layer-wise rates.

Paper tables 12 and 13; official optim_factory.py and utils.py.

The transformation returned by `adamw` leaves out the learning rate: the train step multiplies by
it, so that the rate follows the step counter even where a non-finite update is skipped (as in the
official script when the loss scaler skips one).
"""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beit_jax.config import OptimizerConfig
from beit_jax.types import Params, PyTree

T = TypeVar("T")
# Patterns of parameter paths and what they say of a parameter; the first match wins.
Rules: TypeAlias = tuple[tuple[str, T], ...]
# A path as `jax.tree_util` gives it.
KeyPath: TypeAlias = tuple[Any, ...]

WARMUP_RATIO = 1e-6  # of the "poly" schedule: `warmup_ratio` of the official segmentation configs

# First match wins. A path has its names joined by "/". The official code exempts
# everything 1-D from decay (optim_factory.py:65); stacked blocks add an axis, so names decide here.
# Easy to miss: mask_token and the relative-position tables are decayed.
DECAY_RULES: Rules[bool] = (
    (r"probe/(kernel|bias)$", True),  # one optimizer group in run_linear_eval.py: bias too
    (r"(bias|scale)$", False),
    (r"gamma_[12]$", False),
    (r"(cls_token|pos_embed)$", False),
    (r"mask_token$", True),
    (r"relative_position_bias/table$", True),
    (r"kernel$", True),
    (r"codebook$", True),
)

# Which depth a parameter counts as (optim_factory.py:33-55). Easy to miss: a
# relative-position table that all blocks share goes with the head.
EMBEDDINGS, BLOCKS, HEAD = "embeddings", "blocks", "head"
LAYER_RULES: Rules[str] = (
    (r"encoder/(cls_token|mask_token|pos_embed)$", EMBEDDINGS),
    (r"encoder/patch_embed/(kernel|bias)$", EMBEDDINGS),
    (r"encoder/blocks/", BLOCKS),
    (r"encoder/relative_position_bias/table$", HEAD),
    (r"(encoder/norm|fc_norm)/(scale|bias)$", HEAD),
    (r"(head|lm_head|probe)/(kernel|bias)$", HEAD),
    (r"(neck|head|auxiliary)/(\w+/)+(kernel|scale|bias)$", HEAD),
)


def path_name(path: KeyPath) -> str:
    """A key path from `jax.tree_util` as names joined by "/"."""
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
        for entry in path
    )


def by_rules(tree: PyTree, rules: Rules[T], *, what: str) -> PyTree:
    """Gives every leaf the value of the first rule whose pattern is found in its path.

    Raises:
      ValueError: some leaves have no rule; all of them are named.
    """
    missing = []

    def value(path: KeyPath, _: Any) -> T | None:
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


def decay_mask(
    params: Params, *, relative_positions: bool = True, class_token: bool = False
) -> PyTree:
    """Booleans in the structure of `params`: whether weight decay applies.

    Args:
      params: nested dict of arrays or shapes.
      relative_positions: whether it applies to relative-position tables (official
        `--disable_weight_decay_on_rel_pos_bias`).
      class_token: whether it applies to the class token and absolute positions. In the official
        segmentation code it does: names there start with "backbone.", which the list of exceptions
        does not know.
    """
    chosen = (
        (r"relative_position_bias/table$", relative_positions),
        (r"(cls_token|pos_embed)$", class_token),
    )
    return by_rules(params, chosen + DECAY_RULES, what="weight-decay")


def layer_multipliers(params: Params, *, decay: float, layers: int) -> PyTree:
    """Factors of the learning rate for each parameter (layer-wise decay).

    With L layers: 1 for head, final norms and a shared relative-position table, decay^(L - i) for
    block i counted from 0, decay^(L + 1) for the embeddings.

    Args:
      params: nested dict of arrays or shapes, with the encoder's under "encoder".
      decay: a layer's rate divided by that of the next layer.
      layers: L, the blocks on the leading axis of everything under `encoder/blocks`.

    Returns:
      float32 arrays in the structure of `params` that broadcast against them: `[l, 1, ...]` for
      blocks, scalars for the rest.

    Raises:
      ValueError: parameters without a rule, or blocks that are not `layers`; all are named.
    """
    wrong = []

    def multiplier(path: KeyPath, leaf: Any, depth: str) -> np.ndarray:
        if depth != BLOCKS:
            return np.asarray(decay ** (layers + 1) if depth == EMBEDDINGS else 1.0, np.float32)
        if leaf.shape[:1] != (layers,):
            wrong.append(f"{path_name(path)} {leaf.shape}")
        powers = decay ** np.arange(layers, 0, -1, dtype=np.float64)
        return powers.astype(np.float32).reshape(layers, *[1] * (len(leaf.shape) - 1))

    depths = by_rules(params, LAYER_RULES, what="layer-decay")
    multipliers = jax.tree_util.tree_map_with_path(multiplier, params, depths)
    if wrong:
        raise ValueError(f"not {layers} blocks on the leading axis of: {', '.join(wrong)}")
    return multipliers


def _count_layers(params: Params) -> int:
    """Blocks on the leading axis of stacked parameters; 0 where none are stacked."""
    depths = by_rules(params, LAYER_RULES, what="layer-decay")
    sizes = [
        leaf.shape[0]
        for leaf, depth in zip(jax.tree.leaves(params), jax.tree.leaves(depths), strict=True)
        if depth == BLOCKS
    ]
    return max(sizes, default=0)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's layer multiplier."""

    def scale(tree: Params) -> Params:
        multipliers = layer_multipliers(tree, decay=decay, layers=_count_layers(tree))
        return jax.tree.map(lambda leaf, multiplier: leaf * multiplier, tree, multipliers)

    def init(params: Params) -> optax.EmptyState:
        # An unknown parameter is an error here, not only at the first update.
        layer_multipliers(params, decay=decay, layers=_count_layers(params))
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        del params
        return scale(updates), state

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The rate as a function of the step, counted from 0.

    Args:
      config: names the schedule, `_cosine` or `_poly`.
      steps: length of the run.
    """
    return _poly(config, steps=steps) if config.schedule == "poly" else _cosine(config, steps=steps)


def _cosine(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The official schedule of pre-training and classification (utils.py:383-400).

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


def _poly(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The official schedule of segmentation (mmcv 1.3.0's PolyLrUpdaterHook of power 1).

    The line from the peak to the minimum starts at step 0, under the warm-up, which multiplies it
    by a factor that rises from 1e-6. mmcv counts iterations, of which `accumulate` make a step,
    and moves the rate with each: a step has the rate of its last one.
    """
    peak, low, per_step = config.learning_rate, config.min_learning_rate, config.accumulate
    length, warmup = steps * per_step, config.warmup_steps * per_step

    def schedule(step: jax.Array) -> jax.Array:
        iteration = (jnp.asarray(step).astype(jnp.float32) + 1) * per_step - 1
        rate = low + (peak - low) * (1 - iteration / length)
        share = iteration / max(warmup, 1)
        # mmcv's 1 - (1 - share)(1 - ratio), which float32 would round at the start.
        rising = share + (1 - share) * WARMUP_RATIO
        return jnp.where(iteration < warmup, rate * rising, rate)

    return schedule


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam's direction plus decoupled decay, to be multiplied by minus the learning rate.

    With `layer_decay` under 1 both are scaled layer by layer: AdamW decays by a group's rate.

    `update` takes one argument more than optax's, `finite`: where it is false the state is kept and
    the returned directions are meaningless.
    """
    decayed = functools.partial(
        decay_mask,
        relative_positions=config.decay_relative_positions,
        class_token=config.decay_class_token,
    )
    steps = [
        _scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    ]
    if config.layer_decay < 1:
        steps.append(_scale_by_layer(config.layer_decay))
    chain = optax.chain(*steps)
    return _without_encoder(chain) if config.freeze_encoder else chain


def _without_encoder(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with no direction, not even of decay, for the encoder; the same state."""

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PyTree]:
        directions, state = optimizer.update(updates, state, params, **extra)
        return (
            directions | {"encoder": jax.tree.map(jnp.zeros_like, directions["encoder"])},
            state,
        )

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which keeps its state where an update is not finite.

    The choice between old and new moment is part of the expression that computes the new one,
    without an extra pass over memory.
    """

    def update(
        updates: Params,
        state: optax.ScaleByAdamState,
        params: Params | None = None,
        *,
        finite: jax.Array | bool = True,
        **extra: Any,
    ) -> tuple[Params, optax.ScaleByAdamState]:
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
    """The factor that clips gradients of this global norm (torch's clip_grad_norm_).

    Args:
      norm: of all gradients together.
      limit: the largest norm allowed; None for no limit.
    """
    return 1.0 if limit is None else jnp.minimum(1.0, limit / (norm + 1e-6))
