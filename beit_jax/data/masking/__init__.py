"""Which patches of an image are hidden from the encoder (BEiT paper §2.3, Algorithm 1).

    config = MaskConfig(kind="block", count=75)
    keys = tf.stack([seeds, epochs, indices], axis=1)  # int64 [batch, 3]
    masks = draw_masks(keys, config=config, grid=14)  # bool [batch, 14, 14]

A mask is a function of its image's key (seed, epoch, index) alone. It does not depend on the batch
in which it is drawn, and a resumed run draws the same masks.

`KINDS` maps `MaskConfig.kind` to a `MaskKind`: how masks are drawn, how many patches they hide at
most, and which settings make sense. A further kind is one row; it needs no change to this package:

    def checkerboard(keys, *, config, grid):
        row, column = np.indices((grid, grid))
        even = tf.constant((row + column) % 2 == 0)
        return even ^ tf.cast(keys[:, 2] % 2, tf.bool)[:, None, None]

    masking.KINDS["checkerboard"] = MaskKind(
        draw=checkerboard, max_masked=lambda config, *, grid: -(-grid * grid // 2)
    )

Settings are checked and masks are bounded without TensorFlow, which is imported when the first mask
is drawn: planning a run and its step on the device need only the bound.
"""

import dataclasses
from typing import TYPE_CHECKING, Protocol

from beit_jax.config import MaskConfig, check, one_of
from beit_jax.data.masking import bounds

if TYPE_CHECKING:
    import tensorflow as tf


class Draw(Protocol):
    """Draws one mask per key, as `draw_masks` describes; runs inside a tf.data graph."""

    def __call__(self, keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor": ...


class Bound(Protocol):
    """The most patches that one mask hides on a grid."""

    def __call__(self, config: MaskConfig, *, grid: int) -> int: ...


class Check(Protocol):
    """Raises ConfigError unless masks of `config` can be drawn on a grid."""

    def __call__(self, config: MaskConfig, *, grid: int) -> None: ...


def _exactly_count(config: MaskConfig, *, grid: int) -> int:
    return config.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskKind:
    """A kind of mask.

    Attributes:
      draw: draws masks. A mask must depend on its own key alone.
      max_masked: a bound on the number of hidden patches; by default `config.count`.
      check: checks the settings of this kind against a grid; by default `count` must fit the grid.
    """

    draw: Draw
    max_masked: Bound = _exactly_count
    check: Check = bounds.check_count


# These import TensorFlow, with the module that draws, when the first mask is drawn.


def _draw_official(keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor":
    from beit_jax.data.masking import blocks

    return blocks.draw_official(keys, config=config, grid=grid)


def _draw_exact(keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor":
    from beit_jax.data.masking import blocks

    return blocks.draw_exact(keys, config=config, grid=grid)


def _draw_paper(keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor":
    from beit_jax.data.masking import blocks

    return blocks.draw_paper(keys, config=config, grid=grid)


def _draw_random(keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor":
    from beit_jax.data.masking import uniform

    return uniform.draw(keys, config=config, grid=grid)


KINDS = {
    "block": MaskKind(draw=_draw_official, check=bounds.check_official),
    "block_exact": MaskKind(draw=_draw_exact, check=bounds.check_official),
    "block_paper": MaskKind(
        draw=_draw_paper, max_masked=bounds.max_paper, check=bounds.check_paper
    ),
    "random": MaskKind(draw=_draw_random),
}


def check_masks(config: MaskConfig, *, grid: int) -> None:
    """Raises unless masks of `config` can be drawn on a grid of `grid` × `grid` patches.

    Args:
      config: the mask settings.
      grid: patches along one side.

    Raises:
      ConfigError: the kind is unknown, there are fewer than `count` patches, or no mask can be
        drawn with these settings.
    """
    one_of(config.kind, "kind", *KINDS)
    check(grid >= 1, "grid", f"must be at least 1, got {grid}")
    KINDS[config.kind].check(config, grid=grid)


def max_masked(config: MaskConfig, *, grid: int) -> int:
    """The most patches that one mask can hide: the static number of slots on the device.

    Args:
      config: the mask settings.
      grid: patches along one side.

    Returns:
      An upper bound on the number of `True` in every mask of `draw_masks`.

    Raises:
      ConfigError: see `check_masks`.
    """
    check_masks(config, grid=grid)
    return KINDS[config.kind].max_masked(config, grid=grid)


def draw_masks(keys: "tf.Tensor", *, config: MaskConfig, grid: int) -> "tf.Tensor":
    """Draws one mask per key; works eagerly and inside a `tf.data` map.

    Args:
      keys: int64 [batch, 3], the seed, epoch and image index of each image. A mask depends on its
        own row alone.
      config: the mask settings.
      grid: patches along one side.

    Returns:
      bool [batch, grid, grid], True where the patch is hidden.

    Raises:
      ConfigError: see `check_masks`.
      ValueError: `keys` is not int64 [batch, 3], or the kind's `draw` returns another shape.
      TypeError: the kind's `draw` returns no booleans.
    """
    import tensorflow as tf

    check_masks(config, grid=grid)
    keys = tf.convert_to_tensor(keys)
    if keys.dtype != tf.int64 or not keys.shape.is_compatible_with([None, 3]):
        raise ValueError(f"keys must be int64 [batch, 3], got {keys.dtype.name} {keys.shape}")
    masks = KINDS[config.kind].draw(keys, config=config, grid=grid)
    if masks.dtype != tf.bool:
        raise TypeError(f"masks of kind {config.kind!r} must be bool, got {masks.dtype.name}")
    return tf.ensure_shape(masks, [keys.shape[0], grid, grid])
