"""Random numbers as a hash of (key, counter): there is no generator state.

The generator is SplitMix64, whose state is its starting point plus a counter: number i of a stream
is a function of the stream's key and of i, and can be computed in any batch and in any order.
"""

import numpy as np
import tensorflow as tf

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: SplitMix64's increment


def mix(words: tf.Tensor) -> tf.Tensor:
    """SplitMix64's output function: a bijection of uint64 that avalanches every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = tf.bitwise.bitwise_xor(words, shift_right(words, shift)) * uint64(factor)
    return tf.bitwise.bitwise_xor(words, shift_right(words, 31))


def streams(keys: tf.Tensor) -> tf.Tensor:
    """The start of each key's stream of numbers: int64 [batch, 3] → uint64 [batch].

    Keys that differ in only one of their numbers never share a start, since `mix` is a bijection.
    """
    keys = tf.bitcast(keys, tf.uint64)
    starts = mix(keys[:, 0] + uint64(GOLDEN))
    starts = mix(starts + keys[:, 1])
    return mix(starts + keys[:, 2])


def uint64(values: np.typing.ArrayLike) -> tf.Tensor:
    """A uint64 constant; TensorFlow itself refuses Python integers of 2**63 and above."""
    return tf.constant(np.asarray(values, np.uint64))


def shift_right(words: tf.Tensor, bits: int) -> tf.Tensor:
    """Logical shift of uint64 words."""
    return tf.bitwise.right_shift(words, uint64(bits))


def uniform(words: tf.Tensor) -> tf.Tensor:
    """Words below 2**32, uint64, as float64 in [0, 1)."""
    # The conversion goes through int64, which a processor turns into a float in one instruction.
    return tf.cast(tf.bitcast(words, tf.int64), tf.float64) * 2.0**-32
