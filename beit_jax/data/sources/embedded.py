"""The embedded set: images drawn by code, for trying everything without a download.

Each is a textured shape on a textured background, a pure function of its index. Its class is the
background's texture, its segmentation map shows the shape.
"""

import numpy as np
import tensorflow as tf

from beit_jax.config import SegmentDataConfig
from beit_jax.data.decode import Window, crop_to_window
from beit_jax.data.source_kinds import EMBEDDED_EVAL_START as EVAL_START
from beit_jax.data.sources.source import Element, Request, Source, check_holdout

# The shape: a segmentation map is 0 on the background and 1 + the index here on the shape.
SHAPES = (
    "disc",
    "square",
    "triangle",
    "ring",
    "cross",
    "flower",
    "bar",
    "crescent",
    "frame",
    "half disc",
)
# The background's texture is the class. (The shape would be too hard a class to learn in a few
# minutes' training.)
TEXTURES = ("stripes", "waves", "checks", "dots", "rings", "gradient")

IMAGES = 10_000
# Images are this much larger than config.image_size, so that most random crops are not enlarged.
SCALE = 1.25


def open_embedded(request: Request) -> Source:
    """Opens "embedded" or "embedded:NUMBER".

    Raises:
      ConfigError: no images are held out.
    """
    value, config = request.value, request.config
    number, start = int(value) if value else IMAGES, 0
    if not request.training:
        start = EVAL_START
        if request.withholds:
            check_holdout(config)
            number = config.holdout
    side = round(SCALE * config.image_size)
    unnamed = isinstance(config, SegmentDataConfig) and config.zero_is_background

    def load(index: tf.Tensor, *, window: Window | None = None) -> Element:
        drawn = draw_embedded(start + index, side=side)
        return drawn | {"image": crop_to_window(drawn["image"], window=window)}

    return Source(
        size=number,
        name=lambda index: f"embedded image {start + index}",
        load=load,
        fields=("image", "label", "segmentation"),
        classes=TEXTURES,
        segmentation_classes=SHAPES if unnamed else ("background", *SHAPES),
        reliable=True,
    )


def draw_embedded(index: tf.Tensor, *, side: int) -> Element:
    """Draws one image of the embedded set: a textured shape on a textured background.

    Both textures are periodic or smooth, in two colours, and continue across patches: a hidden
    patch follows from its neighbours, while colours, scale, angle and phase differ from image to
    image.

    Args:
      index: int64 scalar; the image is a pure function of it and of `side`.
      side: height and width in pixels.

    Returns:
      `image` uint8 [side, side, 3]; `label` int32 scalar, the background's index in `TEXTURES`;
      `segmentation` uint8 [side, side], 0 for the background, 1 + an index in `SHAPES` on the
      shape.
    """
    key = tf.stack([tf.constant(2106_08254, tf.int64), tf.cast(index, tf.int64)])
    uniform = tf.random.stateless_uniform([32], seed=key, alg="philox")

    # Coordinates in -1..1, [side, side].
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = (tf.constant(values) for values in np.meshgrid(axis, axis))

    shape = tf.cast(uniform[0] * len(SHAPES), tf.int32)
    radius = 0.4 + 0.35 * uniform[1]
    angle = 2 * np.pi * uniform[2]
    centre = (uniform[3:5] * 2 - 1) * (0.95 - radius)
    inside = _shape(shape, *_turn((x - centre[0]) / radius, (y - centre[1]) / radius, angle))
    # `inside` is a distance from the outline in units of `radius`; one pixel of soft edge.
    alpha = tf.clip_by_value(inside * radius * (side / 2) + 0.5, 0.0, 1.0)

    background = uniform[5:8]
    # At least 0.3 away from the background in each channel, wrapped around.
    foreground = tf.math.floormod(background + 0.3 + 0.4 * uniform[8:11], 1.0)
    # The shape's two colours are closer to each other, which keeps its outline visible.
    back_share, back_step, label = _texture(x, y, colour=background, uniform=uniform[11:21])
    front_share, front_step, _ = _texture(x, y, colour=foreground, uniform=uniform[21:31])
    colours = tf.stack([background, back_step, foreground, 0.6 * front_step])
    shares = [1 - alpha, (1 - alpha) * back_share, alpha, alpha * front_share]
    # As a matrix product this is several times faster than broadcasting over three channels.
    image = tf.matmul(tf.reshape(shares, [4, side * side]), 255 * colours, transpose_a=True)
    return {
        "image": tf.reshape(tf.cast(image + 0.5, tf.uint8), [side, side, 3]),
        "label": label,
        "segmentation": tf.where(alpha > 0.5, tf.cast(shape + 1, tf.uint8), tf.zeros((), tf.uint8)),
    }


def _turn(x: tf.Tensor, y: tf.Tensor, angle: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Coordinates in axes turned by `angle`."""
    cos, sin = tf.cos(angle), tf.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _shape(shape: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Roughly the distance to the outline, positive inside; the shape fits into |x|, |y| < 1."""

    def disc(x: tf.Tensor, y: tf.Tensor, radius: float) -> tf.Tensor:
        return radius - tf.sqrt(x * x + y * y)

    def box(x: tf.Tensor, y: tf.Tensor, half_width: float, half_height: float) -> tf.Tensor:
        return tf.minimum(half_width - tf.abs(x), half_height - tf.abs(y))

    def triangle() -> tf.Tensor:
        slope = 3**0.5 / 2
        return 0.5 - tf.maximum(y, slope * tf.abs(x) - 0.5 * y)

    def flower() -> tf.Tensor:
        return 0.65 + 0.3 * tf.cos(5 * tf.atan2(y, x)) - tf.sqrt(x * x + y * y)

    drawn = {
        "disc": lambda: disc(x, y, 0.9),
        "square": lambda: box(x, y, 0.8, 0.8),
        "triangle": triangle,
        "ring": lambda: 0.24 - tf.abs(disc(x, y, 0.72)),
        "cross": lambda: tf.maximum(box(x, y, 0.3, 0.95), box(x, y, 0.95, 0.3)),
        "flower": flower,
        "bar": lambda: box(x, y, 1.0, 0.34),
        "crescent": lambda: tf.minimum(disc(x, y, 0.95), -disc(x - 0.5, y, 0.72)),
        "frame": lambda: 0.2 - tf.abs(box(x, y, 0.68, 0.68)),
        "half disc": lambda: tf.minimum(disc(x, y - 0.4, 0.95), 0.4 - y),
    }
    return tf.switch_case(shape, [drawn[name] for name in SHAPES])


def _texture(
    x: tf.Tensor, y: tf.Tensor, *, colour: tf.Tensor, uniform: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A texture in two colours.

    Args:
      x, y: float32 [side, side] in -1..1.
      colour: float32 [3] in 0..1, the first colour; the second is at some distance from it.
      uniform: float32 [10] in 0..1, from which everything else follows.

    Returns:
      The second colour's share, float32 [side, side] in 0..1; the step from the first colour to the
      second, float32 [3]; and the texture's index in `TEXTURES`, int32 scalar.
    """
    frequency = 2 * np.pi * (1.25 + 2.5 * uniform[0])  # radians over half the image
    sharpness = 1.0 + 2.5 * uniform[1]
    along, across = _turn(x, y, np.pi * uniform[2])
    phase, phase_across = 2 * np.pi * uniform[3], 2 * np.pi * uniform[4]
    kind = tf.cast(uniform[5] * len(TEXTURES), tf.int32)

    def stripes(bend: float = 0.0) -> tf.Tensor:
        wave = bend * tf.sin(5 * across + phase_across)
        return tf.cos(frequency * along + phase + wave)

    def grid() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cos(frequency * along + phase), tf.cos(frequency * across + phase_across)

    def checks() -> tf.Tensor:
        first, second = grid()
        return 1.6 * first * second

    def dots() -> tf.Tensor:
        first, second = grid()
        return first + second - 0.5

    def rings() -> tf.Tensor:
        east, north = x - tf.cos(phase), y - tf.sin(phase)
        return tf.cos(frequency * tf.sqrt(east * east + north * north))

    value = tf.switch_case(
        kind,
        [
            stripes,
            lambda: stripes(bend=1.5),
            checks,
            dots,
            rings,
            lambda: (along + 0.4 * across) / sharpness,
        ],
    )
    share = tf.clip_by_value(0.5 + 0.5 * sharpness * value, 0.0, 1.0)
    # A step that would leave 0..1 is taken in the opposite direction, which keeps the contrast.
    step = 0.25 + 0.3 * uniform[6:9]
    return share, tf.where(colour > 0.5, -step, step), kind
