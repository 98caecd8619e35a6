"""Random patches: `count` of them, every set equally likely (paper, table 4's ablation)."""

import numpy as np
import tensorflow as tf

from beit_jax.config import MaskConfig
from beit_jax.data.masking.random_bits import GOLDEN, mix, shift_right, streams, uint64

# Counters of `patch_scores` start here, far above those of the blocks.
FIRST_COUNTER = 1 << 40


def draw(keys: tf.Tensor, *, config: MaskConfig, grid: int) -> tf.Tensor:
    """Draws masks of the kind "random": int64 [batch, 3] → bool [batch, grid, grid]."""
    masks = top(patch_scores(keys, grid=grid), config.count)
    return tf.reshape(masks, [-1, grid, grid])


def fill_up(masks: tf.Tensor, keys: tf.Tensor, *, count: int, grid: int) -> tf.Tensor:
    """Hides further patches, chosen at random, until `count` are hidden.

    Args:
      masks: bool [batch, grid * grid], with at most `count` hidden.
      keys: int64 [batch, 3].
      count: patches to hide.
      grid: patches along one side.

    Returns:
      bool [batch, grid * grid].
    """
    # Hidden patches score above all others, so that only the missing ones are chosen at random.
    scores = patch_scores(keys, grid=grid)
    return top(scores + tf.cast(masks, tf.int64) * (1 << 62), count)


def patch_scores(keys: tf.Tensor, *, grid: int) -> tf.Tensor:
    """A random order of each image's patches: int64 [batch, 3] → int64 [batch, grid * grid].

    The scores are in [0, 2**62). No two scores of an image are equal: the lowest bits hold the
    patch's index and break ties.
    """
    cells = np.arange(grid * grid, dtype=np.uint64)
    counters = uint64(cells + np.uint64(FIRST_COUNTER))
    bits = mix(streams(keys)[:, None] + counters * uint64(GOLDEN))
    index_bits = (grid * grid - 1).bit_length()
    bits = tf.bitwise.left_shift(shift_right(bits, 2 + index_bits), uint64(index_bits))
    return tf.bitcast(bits + uint64(cells), tf.int64)


def top(scores: tf.Tensor, count: int) -> tf.Tensor:
    """The `count` patches of highest score: int64 [batch, cells] → bool [batch, cells]."""
    return scores >= tf.math.top_k(scores, count).values[:, -1:]
