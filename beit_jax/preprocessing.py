"""What every path from pixels to a model agrees on: normalisation, luma, the jitter's layout.

The host (`data/augment.py`, TensorFlow), the device (`training/device_jitter.py`, JAX) and the
weight converters all read these constants here, so that none of them can drift from the others.

    model(normalize(images_uint8, kind="imagenet"))

This module imports nothing else from the package, and never TensorFlow.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Official mean and standard deviation of [0, 1] pixels, RGB (datasets.py:42-44). One row per value
# of `config.data.normalization`; a new row is known everywhere.
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Pixels that an image file may have by default: Pillow's own limit, above which it warns of a
# decompression bomb. As RGB they take a quarter of a gigabyte.
MAX_PIXELS = 89_478_485

# ITU-R 601 luma as Pillow's convert("L") computes it: integers over 2**16.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)

# Official evaluation: below 384 pixels the view is 224/256 of the resized shorter side, from there
# on all of it (datasets.py:151-156).
_SMALL_CROP, _SMALL_BELOW = 224 / 256, 384

# Colour jitter: a batch's `factors`, float32 [b, 3], are indexed by these constants, and its
# `order`, int32 [b, 3], holds them in the order in which the operations are applied.
BRIGHTNESS, CONTRAST, SATURATION = range(3)
JITTER_FIELDS = ("factors", "order")


def normalize(images: jax.Array | np.ndarray, *, kind: str) -> jax.Array:
    """Normalises pixels to about zero mean and unit variance, on the device.

    Args:
      images: uint8 [b, h, w, 3], RGB.
      kind: a key of `NORMALIZATIONS`.

    Returns:
      float32 [b, h, w, 3].

    Raises:
      KeyError: there is no normalisation of that name.
    """
    mean, std = (jnp.asarray(values, jnp.float32) for values in NORMALIZATIONS[kind])
    return jnp.asarray((images.astype(jnp.float32) / 255.0 - mean) / std)


def fill_color(kind: str) -> tuple[int, int, int]:
    """RGB levels of a normalisation's mean, which becomes about zero: timm's fill for gaps."""
    red, green, blue = (round(255 * channel) for channel in NORMALIZATIONS[kind][0])
    return red, green, blue


def eval_shorter_side(image_size: int, *, crop: float | None = None) -> int:
    """The length in pixels to which an image's shorter side is resized before the centre crop.

    Args:
      image_size: side of the cropped view in pixels.
      crop: the view's share of the resized shorter side, in (0, 1]; None for the official one,
        224/256 for views under 384 pixels and 1 for others.
    """
    return int(image_size / (crop or official_crop(image_size)))


def official_crop(image_size: int) -> float:
    """The view's share of the resized shorter side in the official evaluation."""
    return _SMALL_CROP if image_size < _SMALL_BELOW else 1.0
