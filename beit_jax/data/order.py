"""The order of images, computed instead of stored, and the keys of their random numbers."""

import tensorflow as tf

from beit_jax.data.sources import Element

# Separates the random numbers of the order from those of augmentation, whose second number is an
# image's index.
ORDER_SALT = 1 << 60


def permute(
    index: tf.Tensor,
    *,
    size: int,
    seed: tf.Tensor | int,
    epoch: tf.Tensor | int,
    variant: tf.Tensor | int = 0,
) -> tf.Tensor:
    """The image of `index` under a permutation of 0..size - 1 that seed and epoch choose.

    The permutation is a small block cipher whose key shrinks with `size`. It hashes its key and
    runs eight rounds: of a seed used directly only the lowest bits count, which leaves just 256
    orders for few images, and the four rounds of tf.random.experimental.index_shuffle leave traces.

    Args:
      index: int64 scalar in 0..size - 1.
      size: number of images.
      seed, epoch: under 2**31.
      variant: 0 for the epoch's order; other numbers give unrelated permutations.

    Returns:
      int64 scalar.
    """
    first, second, third = (tf.cast(number, tf.int64) for number in (seed, epoch, variant))
    key = tf.random.stateless_uniform(
        [3],
        seed=tf.stack([tf.bitwise.left_shift(first, 32) + second, ORDER_SALT + third]),
        minval=None,
        maxval=None,
        dtype=tf.int32,
        alg="philox",
    )
    last = tf.constant(size - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=last, rounds=8)


def with_key(element: Element, *, seed: int, epoch: tf.Tensor | int) -> Element:
    """Adds `key`, int64 [3]: (seed, epoch, index), from which an image's random numbers follow."""
    key = [tf.cast(number, tf.int64) for number in (seed, epoch, element["index"])]
    return {**element, "key": tf.stack(key)}
