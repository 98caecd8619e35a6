"""Antialiased resizing, as tf.image.resize does it but about twice as fast."""

import tensorflow as tf

# `resize`'s methods under the names that ScaleAndTranslate uses.
KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic", "lanczos3": "lanczos3"}


def resize(crop: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes to a square with antialiasing.

    Args:
      crop: uint8 [h, w, 3].
      size: side of the result in pixels.
      method: a key of `KERNELS`.

    Returns:
      uint8 [size, size, 3]. Bicubic and Lanczos overshoot, hence the clip.
    """
    return to_levels_transposed(resize_transposed(crop, size=size, method=method), offset=0.0)


def resize_transposed(crop: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes to a square with antialiasing, and swaps rows with columns.

    TensorFlow resizes columns pixel by pixel, but rows as long vectors, which is several times
    faster. So the rows are resized, the image is transposed, and the rows are resized again.

    Args:
      crop: uint8 or float32 [h, w, 3].
      size: side of the result in pixels.
      method: a key of `KERNELS`.

    Returns:
      float32 [size (columns), 3, size (rows)].
    """
    height, width = tf.unstack(tf.shape(crop)[:2])
    resized = _resize_rows(tf.reshape(crop, [height, width * 3]), size=size, method=method)
    resized = tf.reshape(tf.transpose(resized), [width, 3 * size])
    resized = _resize_rows(resized, size=size, method=method)
    return tf.reshape(resized, [size, 3, size])


def resize_back(transposed: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes the result of `resize_transposed` and swaps it back: float32 [size, size, 3]."""
    width, channels, height = transposed.shape
    resized = _resize_rows(
        tf.reshape(transposed, [width, channels * height]), size=size, method=method
    )
    resized = tf.transpose(tf.reshape(resized, [size * channels, height]))
    resized = _resize_rows(resized, size=size, method=method)
    return tf.reshape(resized, [size, size, channels])


def _resize_rows(values: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes [n, m] to [size, m], every column independently; float32."""
    number, length = tf.unstack(tf.shape(values))
    scale = tf.cast(size / number, tf.float32)
    resized = tf.raw_ops.ScaleAndTranslate(
        images=tf.reshape(values, [1, number, 1, length]),  # [1, h, w, channels]
        size=[size, 1],
        scale=tf.stack([scale, 1.0]),
        translation=[0.0, 0.0],
        kernel_type=KERNELS[method],
        antialias=True,
    )
    return tf.reshape(resized, [size, length])


def to_levels_transposed(transposed: tf.Tensor, *, offset: tf.Tensor | float) -> tf.Tensor:
    """Rounds and transposes: float32 [columns, 3, rows] → uint8 [rows, columns, 3]."""
    size = transposed.shape[0]
    levels = to_levels(tf.reshape(transposed, [size * 3, size]), offset=offset)
    return tf.reshape(tf.transpose(levels), [size, size, 3])


def to_levels(values: tf.Tensor, *, offset: tf.Tensor | float) -> tf.Tensor:
    """Adds `offset` to float32 values and rounds them to uint8."""
    return tf.cast(clip(values + (offset + 0.5), 0.0, 255.0), tf.uint8)


def clip(pixels: tf.Tensor, low: tf.Tensor | float, high: tf.Tensor | float) -> tf.Tensor:
    """tf.clip_by_value in one pass over the pixels instead of two."""
    return tf.raw_ops.ClipByValue(t=pixels, clip_value_min=low, clip_value_max=high)
