"""Colour jitter on the host: brightness, contrast and saturation in any order, as Pillow does it.

Pillow truncates to integers after each of the three. Here half a level is subtracted instead, which
is the same on average. All of the jitter is then two clips and a product with a 3 x 3 matrix, see
`JitterSteps`.
"""

import dataclasses
import itertools

import tensorflow as tf

from beit_jax.data.resizing import clip
from beit_jax.preprocessing import CONTRAST, LUMA, SATURATION

# The number of pixels, roughly, from which contrast's grey mean is taken; all of a smaller image.
MEAN_SAMPLES = 1 << 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class JitterSteps:
    """All of an image's jitter as clip(clip(pixel, low, high) @ matrix, low, high) + offset.

    Brightness and contrast are affine functions of a channel, saturation is a matrix whose columns
    sum to one, and all three clip to 0..255. A clip commutes with an increasing affine function
    once its bounds are adjusted, so one clip remains before the matrix and one after it. The
    constant is added last, and even after resizing, whose weights sum to one.

    Attributes:
      before, after: float32 [2], the lowest and the highest level.
      matrix: float32 [3, 3].
      offset: float32 scalar.
    """

    before: tf.Tensor
    matrix: tf.Tensor
    after: tf.Tensor
    offset: tf.Tensor


def jitter_steps(image: tf.Tensor, *, factors: tf.Tensor, order: tf.Tensor) -> JitterSteps:
    """Combines an image's three jitter operations.

    Args:
      image: uint8 [h, w, 3], the whole image, since contrast needs its mean.
      factors: float32 [3], of brightness, contrast and saturation.
      order: int32 [3], the operations in the order in which they are applied.
    """
    sample = tf.cast(_sample(image), tf.float32)
    luma = tf.constant([[weight] * 3 for weight in LUMA])
    saturate = factors[SATURATION] * tf.eye(3) + (1 - factors[SATURATION]) * luma
    # Half a level less stands for truncation; a factor of one keeps whole numbers, which truncation
    # leaves alone.
    truncation = tf.where(factors == 1, 0.0, -0.5)

    def combine(order: tuple[int, ...]) -> tf.Tensor:
        # Scale, shift and bounds of what comes before the matrix and of what comes after it.
        identity = tf.constant([1.0, 0.0, 0.0, 255.0])
        before, after, pixels = identity, identity, sample
        for which in order:
            shift = truncation[which]
            if which == SATURATION:
                before, after = after, tf.stack([1.0, shift, 0.0, 255.0])
                if CONTRAST in order[order.index(which) :]:
                    pixels = clip(tf.matmul(pixels, saturate) + shift, 0.0, 255.0)
                continue
            if which == CONTRAST:
                mean = tf.round(tf.reduce_mean(tf.matmul(pixels, luma)))
                shift += mean * (1 - factors[which])
            elif CONTRAST in order[order.index(which) :]:
                pixels = clip(factors[which] * pixels + shift, 0.0, 255.0)
            after = after * factors[which] + shift * tf.constant([0.0, 1.0, 1.0, 1.0])
            after = tf.concat([after[:2], tf.clip_by_value(after[2:], 0.0, 255.0)], 0)
        # A factor of zero makes the image uniform, and so does a tiny one.
        scale = tf.maximum(before[0], 1e-6)
        offset = after[0] * before[1] + after[1]
        first, last = (before[2:] - before[1]) / scale, after[2:] - offset
        return tf.concat([first, last, [offset, scale * after[0]]], 0)

    branch = 2 * order[0] + tf.cast(order[1] > order[2], tf.int32)
    orders = list(itertools.permutations(range(3)))  # in the order of `branch`
    combined = tf.switch_case(branch, [lambda order=order: combine(order) for order in orders])
    return JitterSteps(
        before=combined[:2],
        matrix=combined[5] * saturate,
        after=combined[2:4],
        offset=combined[4],
    )


def apply_jitter(pixels: tf.Tensor, *, steps: JitterSteps) -> tf.Tensor:
    """All of the jitter except its offset; uint8 [h, w, 3] → float32 [h, w, 3]."""
    flat = tf.cast(tf.reshape(pixels, [-1, 3]), tf.float32)
    flat = clip(flat, steps.before[0], steps.before[1])
    flat = clip(tf.matmul(flat, steps.matrix), steps.after[0], steps.after[1])
    return tf.reshape(flat, tf.shape(pixels))


def _sample(image: tf.Tensor) -> tf.Tensor:
    """Evenly spaced rows of the image with about MEAN_SAMPLES pixels, uint8 [n, 3]."""
    height, width = tf.unstack(tf.shape(image)[:2])
    stride = tf.clip_by_value(height * width // MEAN_SAMPLES, 1, height)
    return tf.reshape(tf.gather(image, tf.range(stride // 2, height, stride)), [-1, 3])
