"""Photometric distortion of segmentation's training views (mmseg's PhotoMetricDistortion).

Brightness, contrast, saturation and hue, each with probability one half, on 8-bit levels: every
step clips to 0..255 and drops what comes after the decimal point, as the official code's does.
Saturation and hue are changed in OpenCV's 8-bit HSV, whose hue has units of two degrees.

    parameters = draw(key, config=SegmentAugmentConfig())
    image = apply(image, parameters=parameters)  # uint8 [h, w, 3], RGB
"""

import tensorflow as tf

from beit_jax.config import SegmentAugmentConfig
from beit_jax.data.resizing import clip

Parameters = dict[str, tf.Tensor]

HUES = 180  # OpenCV's range
# OpenCV divides by multiplying: with 255 / v and 180 / (6 * d), as whole numbers of 1/4096.
_SHIFT = 12
_SATURATION = [0] + [round((255 << _SHIFT) / value) for value in range(1, 256)]
_HUE = [0] + [round((HUES << _SHIFT) / (6 * value)) for value in range(1, 256)]


def draw(key: tf.Tensor, *, config: SegmentAugmentConfig) -> Parameters:
    """Draws one image's distortion.

    Args:
      key: int64 [2]; the result is a pure function of it.
      config: ranges. A step whose range is 0 is never taken.

    Returns:
      A dict of
        brightness: float32 scalar, levels that are added.
        contrast, saturation: float32 scalars, factors.
        hue: int32 scalar, what is added to the hue, in units of two degrees.
        taken: bool [4], whether each of these is applied, in this order.
        contrast_first: bool scalar; contrast comes before saturation and hue, not after them.
    """
    uniform = tf.random.stateless_uniform([9], seed=key, alg="philox")
    ranges = [config.brightness, config.contrast, config.saturation, config.hue]
    amount = 2 * uniform[:3] - 1
    hue = tf.cast(tf.floor(2 * config.hue * uniform[3]), tf.int32)
    return {
        "brightness": config.brightness * amount[0],
        "contrast": 1 + config.contrast * amount[1],
        "saturation": 1 + config.saturation * amount[2],
        "hue": tf.minimum(hue, 2 * config.hue - 1) - config.hue,
        "taken": (uniform[4:8] < 0.5) & (tf.constant([float(value) for value in ranges]) > 0),
        "contrast_first": uniform[8] < 0.5,
    }


def apply(image: tf.Tensor, *, parameters: Parameters) -> tf.Tensor:
    """Applies drawn parameters: brightness, contrast or not yet, saturation, hue, contrast if not.

    Args:
      image: uint8 [h, w, 3], RGB.
      parameters: as `draw` returns them.

    Returns:
      uint8 [h, w, 3].
    """
    brightness, contrast, saturation, hue = tf.unstack(parameters["taken"])
    first = parameters["contrast_first"]

    def change_contrast(image: tf.Tensor, taken: tf.Tensor) -> tf.Tensor:
        return tf.cond(
            taken, lambda: convert(image, scale=parameters["contrast"], shift=0.0), lambda: image
        )

    image = tf.cond(
        brightness,
        lambda: convert(image, scale=1.0, shift=parameters["brightness"]),
        lambda: image,
    )
    image = change_contrast(image, contrast & first)
    image = tf.cond(
        saturation, lambda: saturate(image, factor=parameters["saturation"]), lambda: image
    )
    image = tf.cond(hue, lambda: turn_hue(image, by=parameters["hue"]), lambda: image)
    return change_contrast(image, contrast & ~first)


def convert(levels: tf.Tensor, *, scale: tf.Tensor | float, shift: tf.Tensor | float) -> tf.Tensor:
    """`levels * scale + shift`, clipped and truncated; uint8 of any shape to the same."""
    return tf.cast(clip(tf.cast(levels, tf.float32) * scale + shift, 0.0, 255.0), tf.uint8)


def saturate(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    """Multiplies the saturation of a uint8 image [h, w, 3]; factor is a float32 scalar."""
    hue, saturation, value = to_hsv(image)
    changed = tf.floor(clip(tf.cast(saturation, tf.float32) * factor, 0.0, 255.0))
    return to_rgb(hue, changed, value, shape=tf.shape(image))


def turn_hue(image: tf.Tensor, *, by: tf.Tensor) -> tf.Tensor:
    """Adds to the hue of a uint8 image [h, w, 3], around the circle; `by` is an int32 scalar."""
    hue, saturation, value = to_hsv(image)
    return to_rgb((hue + by) % HUES, saturation, value, shape=tf.shape(image))


def to_hsv(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Hue (0..179), saturation and value (0..255) as OpenCV's COLOR_RGB2HSV has them.

    Args:
      image: uint8 [h, w, 3], RGB.

    Returns:
      Three int32 [h * w].
    """
    # Each channel as one long vector: operations then run over whole registers.
    red, green, blue = tf.unstack(tf.cast(tf.transpose(tf.reshape(image, [-1, 3])), tf.int32))
    value = tf.maximum(tf.maximum(red, green), blue)
    range_ = value - tf.minimum(tf.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturation = tf.bitwise.right_shift(range_ * tf.gather(_SATURATION, value) + half, _SHIFT)
    sixths = tf.where(
        value == red,
        green - blue,
        tf.where(value == green, blue - red + 2 * range_, red - green + 4 * range_),
    )
    hue = tf.bitwise.right_shift(sixths * tf.gather(_HUE, range_) + half, _SHIFT)
    return tf.where(hue < 0, hue + HUES, hue), saturation, value


def to_rgb(
    hue: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor, *, shape: tf.Tensor
) -> tf.Tensor:
    """Back from HSV as OpenCV's COLOR_HSV2RGB does it, which truncates to whole levels.

    Args:
      hue, saturation, value: int32 or float32 [h * w], whole numbers in the ranges of `to_hsv`.
      shape: of the image, [h, w, 3].

    Returns:
      uint8 [h, w, 3]. (OpenCV fuses products and sums, so that one in 20,000 levels differs by one,
      and rounds in the last few pixels of rows that don't fill its vectors.)
    """
    sixths = tf.cast(hue, tf.float32) * (6 / HUES)
    share = tf.cast(saturation, tf.float32) * (1 / 255)
    largest = tf.cast(value, tf.float32) * (1 / 255)
    sector = tf.floor(sixths)
    at = sixths - sector
    smallest = largest * (1 - share)
    falling = largest * (1 - share * at)
    rising = largest * (1 - share * (1 - at))

    def channel(*by_sector: tf.Tensor) -> tf.Tensor:
        *others, levels = by_sector
        for number, option in enumerate(others):
            levels = tf.where(sector == number, option, levels)
        return levels

    channels = [
        channel(largest, falling, smallest, smallest, rising, largest),
        channel(rising, largest, largest, falling, smallest, smallest),
        channel(smallest, smallest, rising, largest, largest, falling),
    ]
    levels = tf.cast(tf.stack(channels) * 255, tf.uint8)
    return tf.reshape(tf.transpose(levels), shape)
