"""RandAugment as timm 0.3.2 has it under the name "rand-m9-mstd0.5-inc1".

A few operations per image are drawn with replacement from fifteen. Every one of them is applied
with probability 0.5 and a magnitude from N(9, 0.5), out of 10. "Increasing" means that a larger
magnitude changes the image more, for all operations. Drawing and applying are separate functions:

    parameters = draw(key, config=ClassifyAugmentConfig())
    image = apply(image, parameters=parameters, fill=(124, 116, 104))

Everything here is a pure TensorFlow function that runs inside a tf.data graph. The results equal
Pillow's exactly where Pillow works with integers or tables, and up to one level at a few pixels
where it works with floating point numbers (blends, bicubic interpolation; float32 here, float64
there).
"""

from collections.abc import Callable

import tensorflow as tf

from beit_jax.config import ClassifyAugmentConfig, one_of
from beit_jax.data.geometry import EPSILON, move_x, move_y, rotate
from beit_jax.data.tracing import traced_once
from beit_jax.preprocessing import LUMA

# Drawn numbers are indices into this tuple (timm's _RAND_INCREASING_TRANSFORMS, in its order).
OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)

# The effect of an operation at full magnitude (timm's LEVEL_TO_ARG).
MAX_MAGNITUDE = 10
MAX_ROTATION = 30  # degrees
MAX_SHEAR = 0.3  # pixels per pixel
MAX_TRANSLATION = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # blend factor's distance from 1
MAX_POSTERIZATION = 4  # bits lost, of the 4 that are kept at magnitude 0
MAX_SOLARIZATION = 256  # how far below 256 the level lies from which pixels are inverted
MAX_SOLARIZE_ADD = 110  # levels, added to pixels below SOLARIZE_ADD_BELOW
SOLARIZE_ADD_BELOW = 128

Parameters = dict[str, tf.Tensor]


def draw(key: tf.Tensor, *, config: ClassifyAugmentConfig) -> Parameters:
    """Draws one image's operations.

    Args:
      key: int64 [2]; the result is a pure function of it.
      config: the number of operations (n), their magnitudes and their probability.

    Returns:
      A dict of
        operation: int32 [n], indices into `OPERATIONS`, uniform and independent.
        applied: bool [n].
        magnitude: float32 [n], in 0..10.
        sign: float32 [n], 1 or -1: the direction of a rotation, shear, translation or blend.
    """
    choice, applied, normal, sign = tf.unstack(
        tf.random.stateless_uniform([4, config.operations], seed=key, alg="philox")
    )
    count = len(OPERATIONS)
    # Uniform numbers are multiples of 2**-23: half of that keeps the quantile finite.
    normal = tf.math.ndtri(normal + 2.0**-24)
    magnitude = config.magnitude + config.magnitude_std * normal
    return {
        "operation": tf.minimum(tf.cast(choice * count, tf.int32), count - 1),
        "applied": applied < config.operation_probability,
        "magnitude": tf.clip_by_value(magnitude, 0.0, MAX_MAGNITUDE),
        "sign": tf.where(sign < 0.5, -1.0, 1.0),
    }


def apply(image: tf.Tensor, *, parameters: Parameters, fill: tuple[int, int, int]) -> tf.Tensor:
    """Applies drawn operations, one after the other.

    Args:
      image: uint8 [h, w, 3], sides of 3 pixels or more.
      parameters: as `draw` returns them, with a static n.
      fill: RGB levels of what a geometric operation moves into the image.

    Returns:
      uint8 [h, w, 3].
    """
    for position in range(parameters["operation"].shape[0]):
        operation, applied, magnitude, sign = (
            parameters[name][position] for name in ("operation", "applied", "magnitude", "sign")
        )
        branch = tf.where(applied, operation, len(OPERATIONS))
        image = _switch(image, branch=branch, magnitude=magnitude, sign=sign, fill=fill)
    return image


# Traced once for all positions and pipelines: fifteen operations take a second or two to trace.
@traced_once
def _switch(
    image: tf.Tensor,
    *,
    branch: tf.Tensor,
    magnitude: tf.Tensor,
    sign: tf.Tensor,
    fill: tuple[int, int, int],
) -> tf.Tensor:
    """Runs one of `_branches` and no other."""
    branches = _branches(image, magnitude=magnitude, sign=sign, fill=fill)
    return tf.ensure_shape(tf.switch_case(branch, branches), image.shape)


def apply_operation(
    image: tf.Tensor,
    *,
    operation: tf.Tensor | str,
    magnitude: tf.Tensor | float,
    sign: tf.Tensor | float,
    fill: tuple[int, int, int],
) -> tf.Tensor:
    """Applies one operation.

    Args:
      image: uint8 [h, w, 3], sides of 3 pixels or more.
      operation: one of `OPERATIONS`, or its index there as an int32 scalar.
      magnitude: float scalar in 0..10.
      sign: 1 or -1.
      fill: RGB levels of what a geometric operation moves into the image.

    Returns:
      uint8 [h, w, 3].

    Raises:
      ConfigError: there is no operation of that name.
    """
    if isinstance(operation, str):
        one_of(operation, "operation", *OPERATIONS)
        branches = _branches(image, magnitude=magnitude, sign=sign, fill=fill)
        return branches[OPERATIONS.index(operation)]()
    return _switch(image, branch=operation, magnitude=magnitude, sign=sign, fill=fill)


def _branches(
    image: tf.Tensor,
    *,
    magnitude: tf.Tensor | float,
    sign: tf.Tensor | float,
    fill: tuple[int, int, int],
) -> list[Callable[[], tf.Tensor]]:
    """A function without arguments for each of `OPERATIONS`, in that order, and the identity."""
    # float64, like Python's floats, gives the same whole numbers and the same pixels to fill.
    level = tf.cast(magnitude, tf.float64) / MAX_MAGNITUDE
    signed = tf.cast(sign, tf.float64) * level

    def part(full: int) -> tf.Tensor:
        return tf.cast(level * full + EPSILON, tf.int32)

    def factor() -> tf.Tensor:
        return tf.cast(1 + MAX_ENHANCEMENT * signed, tf.float32)

    def shift(share: tf.Tensor, *, axis: int) -> tf.Tensor:
        return share * tf.cast(tf.shape(image)[axis], tf.float64)

    branches = {
        "auto_contrast": lambda: _auto_contrast(image),
        "equalize": lambda: _equalize(image),
        "invert": lambda: 255 - image,
        "rotate": lambda: rotate(image, degrees=MAX_ROTATION * signed, fill=fill),
        "posterize": lambda: _posterize(image, bits=4 - part(MAX_POSTERIZATION)),
        "solarize": lambda: _solarize(image, threshold=256 - part(MAX_SOLARIZATION)),
        "solarize_add": lambda: _solarize_add(image, addition=part(MAX_SOLARIZE_ADD)),
        "color": lambda: _color(image, factor=factor()),
        "contrast": lambda: _contrast(image, factor=factor()),
        "brightness": lambda: _enhance(image, 0.0, factor=factor()),
        "sharpness": lambda: _sharpness(image, factor=factor()),
        "shear_x": lambda: move_x(image, shear=MAX_SHEAR * signed, fill=fill),
        "shear_y": lambda: move_y(image, shear=MAX_SHEAR * signed, fill=fill),
        "translate_x": lambda: move_x(image, by=shift(MAX_TRANSLATION * signed, axis=1), fill=fill),
        "translate_y": lambda: move_y(image, by=shift(MAX_TRANSLATION * signed, axis=0), fill=fill),
    }
    return [*(branches[name] for name in OPERATIONS), lambda: image]


# ---------------------------------------------------------------------------- level by level


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Maps every channel's levels by its row of `table`, [3, 256], which is clipped to 0..255."""
    table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
    return tf.gather(tf.reshape(table, [-1]), _channel_levels(image))


def _channel_levels(image: tf.Tensor) -> tf.Tensor:
    """int32 [h, w, 3] in 0..767: level + 256 * channel."""
    return tf.cast(image, tf.int32) + tf.constant([0, 256, 512])


def _auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches every channel to 0..255 (ImageOps.autocontrast)."""
    low = tf.cast(tf.reduce_min(image, axis=[0, 1]), tf.float64)[:, None]
    high = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.float64)[:, None]
    level = tf.range(256, dtype=tf.float64)[None]
    scale = 255 / tf.maximum(high - low, 1)
    # A cast instead of a floor: they differ below 0, where the level does not occur.
    stretched = tf.cast(level * scale + -low * scale, tf.int32)
    return _look_up(image, tf.where(high > low, stretched, tf.cast(level, tf.int32)))


def _equalize(image: tf.Tensor) -> tf.Tensor:
    """Flattens every channel's histogram (ImageOps.equalize)."""
    levels = tf.reshape(_channel_levels(image), [-1])
    histogram = tf.reshape(tf.math.bincount(levels, minlength=768, maxlength=768), [3, 256])
    highest = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.int32)
    pixels = tf.size(levels) // 3
    # Pixels per level, without those of the highest level.
    step = (pixels - tf.gather(histogram, highest, axis=1, batch_dims=1)) // 255
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    flat = ((step // 2)[:, None] + below) // tf.maximum(step, 1)[:, None]
    # An image of few pixels or of a single level stays unchanged.
    return _look_up(image, tf.where(step[:, None] > 0, flat, tf.range(256)[None]))


def _posterize(image: tf.Tensor, *, bits: tf.Tensor) -> tf.Tensor:
    """Keeps `bits`, int32 scalar in 0..8. Zero bits give black, which newer Pillow refuses."""
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def _solarize(image: tf.Tensor, *, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts the levels from `threshold`, int32 scalar in 0..256, upwards."""
    # Arithmetic is several times faster than tf.where, which branches at every level.
    ones = tf.where(threshold < 256, tf.constant(255, tf.uint8), tf.constant(0, tf.uint8))
    bright = tf.cast(image >= tf.cast(tf.minimum(threshold, 255), tf.uint8), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * ones)


def _solarize_add(image: tf.Tensor, *, addition: tf.Tensor) -> tf.Tensor:
    """Adds to the dark levels; `addition` is an int32 scalar in 0..127, so that none overflows."""
    dark = tf.cast(image < SOLARIZE_ADD_BELOW, tf.uint8)
    return image + dark * tf.cast(addition, tf.uint8)


# ---------------------------------------------------------------------------- blends


def blend(pixels: tf.Tensor, degenerate: tf.Tensor | float, factor: tf.Tensor) -> tf.Tensor:
    """Pillow's Image.blend: from `degenerate` (factor 0) through `pixels` (1) and beyond.

    Args:
      pixels, degenerate: float32, whole numbers in 0..255, of shapes that broadcast.
      factor: float32 scalar.

    Returns:
      float32, whole numbers in 0..255.
    """
    mixed = degenerate + factor * (pixels - degenerate)
    return tf.floor(tf.clip_by_value(mixed, 0.0, 255.0))


def grey(pixels: tf.Tensor) -> tf.Tensor:
    """Pillow's convert("L"), exactly, repeated in all three channels: float32 [n, 3] → [n, 3].

    Both are whole numbers: in units of 2**-16, every product and sum here is below 2**24.
    """
    # One small matmul is several times faster here than slicing channels and broadcasting.
    weights = tf.constant([[weight] * 3 for weight in LUMA])
    return tf.floor(tf.matmul(pixels, weights) + 0.5)


def _enhance(image: tf.Tensor, degenerate: tf.Tensor | float, *, factor: tf.Tensor) -> tf.Tensor:
    """Blends `degenerate`, float32 that broadcasts to the image, with the image."""
    return tf.cast(blend(tf.cast(image, tf.float32), degenerate, factor), tf.uint8)


def _grey(image: tf.Tensor) -> tf.Tensor:
    """float32 [h, w, 3]."""
    pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    return tf.reshape(grey(pixels), tf.shape(image))


def _color(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    return _enhance(image, _grey(image), factor=factor)


def _contrast(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    # float64 sums whole numbers exactly at any size.
    mean = tf.reduce_mean(tf.cast(_grey(image)[..., 0], tf.float64))
    return _enhance(image, tf.cast(tf.floor(mean + 0.5), tf.float32), factor=factor)


def _sharpness(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    """Blends with ImageFilter.SMOOTH: weights 1 around 5, over 13; edges stay unchanged."""
    weights = tf.reshape(tf.repeat(tf.constant([1, 1, 1, 1, 5, 1, 1, 1, 1.0]), 3), [3, 3, 3, 1])
    sums = tf.nn.depthwise_conv2d(
        tf.cast(image, tf.float32)[None], weights, strides=[1, 1, 1, 1], padding="VALID"
    )[0]
    # Sums are whole numbers, and no 13th of a whole number lies halfway, so rounding is safe.
    smooth = tf.floor(sums * (1 / 13) + 0.5)
    middle = _enhance(image[1:-1, 1:-1], smooth, factor=factor)
    middle = tf.concat([image[1:-1, :1], middle, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)
