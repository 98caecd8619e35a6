"""RandAugment as timm 0.3.2 has it under the name "rand-m9-mstd0.5-inc1".

A few operations per image, drawn with replacement from fifteen; each is applied with probability
0.5 and with a magnitude of its own from N(9, 0.5), of 10. "Increasing": a larger magnitude is
further from the image as it was, for every operation. What is drawn is apart from how it is
applied:

    parameters = draw(key, config=ClassifyAugmentConfig())
    image = apply(image, parameters=parameters, fill=(124, 116, 104))

Everything here is a pure TensorFlow function that runs inside a tf.data graph, and equals Pillow:
exactly where it works with integers or tables, and but for one level at a few pixels where Pillow
works with floating point numbers (blends, bicubic interpolation; float32 here, float64 there).
"""

import math
from collections.abc import Callable

import tensorflow as tf

from beit_jax.config import ClassifyAugmentConfig, one_of
from beit_jax.data import augment

# Drawn numbers are places in this tuple (timm's _RAND_INCREASING_TRANSFORMS, in its order).
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

# What an operation does at full magnitude (timm's LEVEL_TO_ARG).
MAX_MAGNITUDE = 10
MAX_ROTATION = 30  # degrees
MAX_SHEAR = 0.3  # pixels per pixel
MAX_TRANSLATION = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # blend factor's distance from 1
MAX_POSTERIZATION = 4  # bits lost, of the 4 that are left at magnitude 0
MAX_SOLARIZATION = 256  # levels under 256 from which on pixels are inverted
MAX_SOLARIZE_ADD = 110  # levels, added to pixels under SOLARIZE_ADD_BELOW
SOLARIZE_ADD_BELOW = 128

# Added before numbers that are whole in exact arithmetic are cut or compared: TensorFlow may
# rearrange constants (0.3 * (m / 10) into 0.03 * m), which then come out just below. Magnitudes and
# pixels lie far further apart.
EPSILON = 1e-9

Parameters = dict[str, tf.Tensor]


def draw(key: tf.Tensor, *, config: ClassifyAugmentConfig) -> Parameters:
    """Draws one image's operations.

    Args:
      key: int64 [2]; the result is a pure function of it.
      config: how many operations (n), their magnitudes, how probable each is to be applied.

    Returns:
      A dict of
        operation: int32 [n], places in `OPERATIONS`, uniform and independent.
        applied: bool [n].
        magnitude: float32 [n], in 0..10.
        sign: float32 [n], 1 or -1: which way to rotate, shear, translate or blend.
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
      parameters: as `draw` returns them, n of a static size.
      fill: RGB levels of what a geometric operation moves into the image.

    Returns:
      uint8 [h, w, 3].
    """
    for place in range(parameters["operation"].shape[0]):
        operation, applied, magnitude, sign = (
            parameters[name][place] for name in ("operation", "applied", "magnitude", "sign")
        )
        branch = tf.where(applied, operation, len(OPERATIONS))
        image = _switch(image, branch=branch, magnitude=magnitude, sign=sign, fill=fill)
    return image


# Traced once for every place and pipeline: fifteen operations are a second or two of start-up.
@augment.traced_once
def _switch(
    image: tf.Tensor,
    *,
    branch: tf.Tensor,
    magnitude: tf.Tensor,
    sign: tf.Tensor,
    fill: tuple[int, int, int],
) -> tf.Tensor:
    """Runs one of `_branches`, and none but that one."""
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
      operation: one of `OPERATIONS`, or an int32 scalar, its place there.
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
    # float64, as Python's floats: the same whole numbers, and the same pixels left for `fill`.
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
        "rotate": lambda: _rotate(image, degrees=MAX_ROTATION * signed, fill=fill),
        "posterize": lambda: _posterize(image, bits=4 - part(MAX_POSTERIZATION)),
        "solarize": lambda: _solarize(image, threshold=256 - part(MAX_SOLARIZATION)),
        "solarize_add": lambda: _solarize_add(image, addition=part(MAX_SOLARIZE_ADD)),
        "color": lambda: _color(image, factor=factor()),
        "contrast": lambda: _contrast(image, factor=factor()),
        "brightness": lambda: _enhance(image, 0.0, factor=factor()),
        "sharpness": lambda: _sharpness(image, factor=factor()),
        "shear_x": lambda: _move_x(image, shear=MAX_SHEAR * signed, fill=fill),
        "shear_y": lambda: _move_y(image, shear=MAX_SHEAR * signed, fill=fill),
        "translate_x": lambda: _move_x(
            image, by=shift(MAX_TRANSLATION * signed, axis=1), fill=fill
        ),
        "translate_y": lambda: _move_y(
            image, by=shift(MAX_TRANSLATION * signed, axis=0), fill=fill
        ),
    }
    return [*(branches[name] for name in OPERATIONS), lambda: image]


# ---------------------------------------------------------------------------- level by level


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Each channel's levels through its row of `table`, int or float [3, 256], cut to 0..255."""
    table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
    return tf.gather(tf.reshape(table, [-1]), _channel_levels(image))


def _channel_levels(image: tf.Tensor) -> tf.Tensor:
    """int32 [h, w, 3] in 0..767: level + 256 * channel."""
    return tf.cast(image, tf.int32) + tf.constant([0, 256, 512])


def _auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Each channel stretched to 0..255 (ImageOps.autocontrast)."""
    low = tf.cast(tf.reduce_min(image, axis=[0, 1]), tf.float64)[:, None]
    high = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.float64)[:, None]
    level = tf.range(256, dtype=tf.float64)[None]
    scale = 255 / tf.maximum(high - low, 1)
    # Cast and not floor, which differ under 0, but there the level does not occur.
    stretched = tf.cast(level * scale + -low * scale, tf.int32)
    return _look_up(image, tf.where(high > low, stretched, tf.cast(level, tf.int32)))


def _equalize(image: tf.Tensor) -> tf.Tensor:
    """Each channel's histogram made flat (ImageOps.equalize)."""
    levels = tf.reshape(_channel_levels(image), [-1])
    histogram = tf.reshape(tf.math.bincount(levels, minlength=768, maxlength=768), [3, 256])
    highest = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.int32)
    pixels = tf.size(levels) // 3
    # Pixels per level, without those of the highest level.
    step = (pixels - tf.gather(histogram, highest, axis=1, batch_dims=1)) // 255
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    flat = ((step // 2)[:, None] + below) // tf.maximum(step, 1)[:, None]
    # An image of few pixels or of one level stays as it is.
    return _look_up(image, tf.where(step[:, None] > 0, flat, tf.range(256)[None]))


def _posterize(image: tf.Tensor, *, bits: tf.Tensor) -> tf.Tensor:
    """Keeps `bits`, int32 scalar in 0..8. None is black, which newer Pillow refuses to do."""
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def _solarize(image: tf.Tensor, *, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts levels from `threshold`, int32 scalar in 0..256, on."""
    # Arithmetic is several times faster than tf.where, which branches at every level.
    ones = tf.where(threshold < 256, tf.constant(255, tf.uint8), tf.constant(0, tf.uint8))
    bright = tf.cast(image >= tf.cast(tf.minimum(threshold, 255), tf.uint8), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * ones)


def _solarize_add(image: tf.Tensor, *, addition: tf.Tensor) -> tf.Tensor:
    """Adds to the dark levels; `addition` is an int32 scalar in 0..127, so that none overflows."""
    dark = tf.cast(image < SOLARIZE_ADD_BELOW, tf.uint8)
    return image + dark * tf.cast(addition, tf.uint8)


# ---------------------------------------------------------------------------- blends


def _enhance(image: tf.Tensor, degenerate: tf.Tensor | float, *, factor: tf.Tensor) -> tf.Tensor:
    """From `degenerate`, float32 that broadcasts to the image, through the image and beyond."""
    return tf.cast(augment.blend(tf.cast(image, tf.float32), degenerate, factor), tf.uint8)


def _grey(image: tf.Tensor) -> tf.Tensor:
    """float32 [h, w, 3]."""
    pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    return tf.reshape(augment.grey(pixels), tf.shape(image))


def _color(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    return _enhance(image, _grey(image), factor=factor)


def _contrast(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    # float64 sums whole numbers exactly at any size.
    mean = tf.reduce_mean(tf.cast(_grey(image)[..., 0], tf.float64))
    return _enhance(image, tf.cast(tf.floor(mean + 0.5), tf.float32), factor=factor)


def _sharpness(image: tf.Tensor, *, factor: tf.Tensor) -> tf.Tensor:
    """The degenerate is ImageFilter.SMOOTH: weights 1 around 5, over 13; edges stay as they are."""
    weights = tf.reshape(tf.repeat(tf.constant([1, 1, 1, 1, 5, 1, 1, 1, 1.0]), 3), [3, 3, 3, 1])
    sums = tf.nn.depthwise_conv2d(
        tf.cast(image, tf.float32)[None], weights, strides=[1, 1, 1, 1], padding="VALID"
    )[0]
    # Sums are whole numbers, and no 13th of one lies halfway, so that rounding is safe.
    smooth = tf.floor(sums * (1 / 13) + 0.5)
    middle = _enhance(image[1:-1, 1:-1], smooth, factor=factor)
    middle = tf.concat([image[1:-1, :1], middle, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)


# ---------------------------------------------------------------------------- geometry
#
# Pillow's transform: the centre of result pixel i is at i + 0.5, an affine map says where in the
# image it comes from, and bicubic interpolation takes four pixels of each axis around that point.
# Beyond the image its edge is repeated, but a point outside of the image itself becomes `fill`.


def _cubic(
    before: tf.Tensor, left: tf.Tensor, right: tf.Tensor, after: tf.Tensor, at: tf.Tensor
) -> tf.Tensor:
    """The cubic through `left` and `right`, `at` in 0..1 between them.

    Its slopes there are right - before and after - left (a = -1 in Keys' family, where resizing has
    -0.5). Differences first: they are exact, and an even surface stays exactly even, though the
    result is then cut to whole numbers.
    """
    rise, fall = before - left, after - right
    cubic = fall - rise
    return left + at * ((right - before) + at * ((rise - cubic) + at * cubic))


def _to_levels(values: tf.Tensor) -> tf.Tensor:
    """Pillow cuts interpolated values to whole numbers."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _move_x(
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
    # Every pixel of a row is equally far between pixels, so that four shifted rows are mixed.
    column = tf.cast(start, tf.int32)[:, None] + tf.range(-1, width + 2)[None]
    column = tf.clip_by_value(column, 0, width - 1)
    shifted = tf.gather(image, column, axis=1, batch_dims=1)
    shifted = tf.cast(tf.reshape(shifted, [height, 3 * (width + 3)]), tf.float32)
    taps = [shifted[:, 3 * tap : 3 * (tap + width)] for tap in range(4)]
    moved = tf.reshape(_to_levels(_cubic(*taps, at)), tf.shape(image))
    source = x[None] + (offset + EPSILON)[:, None]
    inside = (source >= 0) & (source < tf.cast(width, tf.float64))
    return tf.where(inside[..., None], moved, tf.constant(fill, tf.uint8))


def _move_y(image: tf.Tensor, **arguments: tf.Tensor | tuple[int, int, int]) -> tf.Tensor:
    """Pixel (x, y) of the result comes from (x, y + shear * x + by)."""
    moved = _move_x(tf.transpose(image, [1, 0, 2]), **arguments)
    return tf.transpose(moved, [1, 0, 2])


def _rotate(image: tf.Tensor, *, degrees: tf.Tensor, fill: tuple[int, int, int]) -> tf.Tensor:
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

    # The four pixels above each other that a point needs, side by side: four columns to fetch for
    # a point instead of sixteen pixels. Row r of `columns` has the image's rows from r - 2 on.
    padded = tf.gather(image, tf.clip_by_value(tf.range(-2, height + 2), 0, height - 1))
    padded = tf.gather(padded, tf.clip_by_value(tf.range(-2, width + 2), 0, width - 1), axis=1)
    columns = tf.concat([padded[tap : height + 1 + tap] for tap in range(4)], -1)
    columns = tf.reshape(columns, [-1, 12])
    # Where the point lies outside of the image, any place will do.
    left = tf.clip_by_value(tf.cast(left, tf.int32), -1, width - 1)
    top = tf.clip_by_value(tf.cast(top, tf.int32), -1, height - 1)
    first = (top + 1) * (width + 4) + (left + 1)
    taps = [tf.cast(tf.gather(columns, first + tap), tf.float32) for tap in range(4)]
    across = _cubic(*taps, at_x)
    taps = [across[:, 3 * tap : 3 * (tap + 1)] for tap in range(4)]
    rotated = tf.reshape(_to_levels(_cubic(*taps, at_y)), tf.shape(image))
    return tf.where(inside[..., None], rotated, tf.constant(fill, tf.uint8))
