"""Shear, translation and rotation as Pillow does them, with bicubic interpolation.

The centre of result pixel i is at i + 0.5. An affine map says where in the image it comes from, and
bicubic interpolation takes four pixels along each axis around that point. The image's edge is
repeated beyond it, but a point that lies outside the image itself becomes `fill`.
"""

import math

import tensorflow as tf

# Added before numbers that are whole in exact arithmetic are truncated or compared: TensorFlow may
# rearrange constants (0.3 * (m / 10) into 0.03 * m), which then come out just below. Magnitudes and
# pixels are much further apart.
EPSILON = 1e-9


def _cubic(taps: list[tf.Tensor], at: tf.Tensor) -> tf.Tensor:
    """Interpolates between the second and the third of four taps, at `at` in 0..1 between them.

    The cubic's slopes there are right - before and after - left, that is a = -1
    in Keys' family, where resizing has -0.5. Differences are taken first: they are exact, so that a
    uniform surface stays exactly uniform although the result is then truncated.
    """
    before, left, right, after = taps
    rise, fall = before - left, after - right
    cubic = fall - rise
    return left + at * ((right - before) + at * ((rise - cubic) + at * cubic))


def _to_levels(values: tf.Tensor) -> tf.Tensor:
    """Pillow truncates interpolated values to whole numbers."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def move_x(
    image: tf.Tensor,
    *,
    fill: tuple[int, int, int],
    shear: tf.Tensor | float = 0.0,
    by: tf.Tensor | float = 0.0,
) -> tf.Tensor:
    """Pixel (x, y) of the result comes from (x + shear * y + by, y)."""
    height, width = tf.unstack(tf.shape(image)[:2])
    x = tf.range(tf.cast(width, tf.float64), dtype=tf.float64) + 0.5
    y = tf.range(tf.cast(height, tf.float64), dtype=tf.float64) + 0.5
    offset = shear * y + by
    start = tf.floor(offset)
    at = tf.cast(offset - start, tf.float32)[:, None]
    # All pixels of a row have the same fractional offset, so that four shifted rows are mixed.
    column = tf.cast(start, tf.int32)[:, None] + tf.range(-1, width + 2)[None]
    column = tf.clip_by_value(column, 0, width - 1)
    shifted = tf.gather(image, column, axis=1, batch_dims=1)
    shifted = tf.cast(tf.reshape(shifted, [height, 3 * (width + 3)]), tf.float32)
    taps = [shifted[:, 3 * tap : 3 * (tap + width)] for tap in range(4)]
    moved = tf.reshape(_to_levels(_cubic(taps, at)), tf.shape(image))
    source = x[None] + (offset + EPSILON)[:, None]
    inside = (source >= 0) & (source < tf.cast(width, tf.float64))
    return tf.where(inside[..., None], moved, tf.constant(fill, tf.uint8))


def move_y(image: tf.Tensor, **arguments: tf.Tensor | tuple[int, int, int]) -> tf.Tensor:
    """Pixel (x, y) of the result comes from (x, y + shear * x + by)."""
    moved = move_x(tf.transpose(image, [1, 0, 2]), **arguments)
    return tf.transpose(moved, [1, 0, 2])


def rotate(image: tf.Tensor, *, degrees: tf.Tensor, fill: tuple[int, int, int]) -> tf.Tensor:
    """Rotates counter-clockwise around the centre."""
    height, width = tf.unstack(tf.shape(image)[:2])
    full_height, full_width = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    angle = -degrees * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    centre_x, centre_y = full_width / 2, full_height / 2
    x = tf.range(full_width, dtype=tf.float64)[None] + 0.5
    y = tf.range(full_height, dtype=tf.float64)[:, None] + 0.5
    source_x = cos * x + (sin * y + (centre_x - cos * centre_x - sin * centre_y))
    source_y = -sin * x + (cos * y + (centre_y + sin * centre_x - cos * centre_y))
    inside = (source_x >= 0) & (source_x < full_width) & (source_y >= 0) & (source_y < full_height)
    source_x, source_y = tf.reshape(source_x, [-1]) - 0.5, tf.reshape(source_y, [-1]) - 0.5
    left, top = tf.floor(source_x), tf.floor(source_y)
    at_x = tf.cast(source_x - left, tf.float32)[:, None]
    at_y = tf.cast(source_y - top, tf.float32)[:, None]

    # The four vertically adjacent pixels that a point needs lie side by side in `columns`, so that
    # four columns are gathered per point instead of sixteen pixels. Its row r holds the image's
    # rows from r - 2 on.
    padded = tf.gather(image, tf.clip_by_value(tf.range(-2, height + 2), 0, height - 1))
    padded = tf.gather(padded, tf.clip_by_value(tf.range(-2, width + 2), 0, width - 1), axis=1)
    columns = tf.concat([padded[tap : height + 1 + tap] for tap in range(4)], -1)
    columns = tf.reshape(columns, [-1, 12])
    # Any position will do for a point outside the image, which is filled.
    left = tf.clip_by_value(tf.cast(left, tf.int32), -1, width - 1)
    top = tf.clip_by_value(tf.cast(top, tf.int32), -1, height - 1)
    first = (top + 1) * (width + 4) + (left + 1)
    taps = [tf.cast(tf.gather(columns, first + tap), tf.float32) for tap in range(4)]
    across = _cubic(taps, at_x)
    taps = [across[:, 3 * tap : 3 * (tap + 1)] for tap in range(4)]
    rotated = tf.reshape(_to_levels(_cubic(taps, at_y)), tf.shape(image))
    return tf.where(inside[..., None], rotated, tf.constant(fill, tf.uint8))
