"""From a decoded image to the view a classifier is given, in training and in evaluation.

In training, as timm 0.3.2's `create_transform` has it (datasets.py:127-169): a random resized crop,
a horizontal flip, RandAugment. In evaluation: the shorter side is resized and the centre cropped.
Drawing and applying are separate functions; together they are

    view = training_view(
        image, key, config=ClassifyAugmentConfig(), image_size=224, normalization="half"
    )

Everything here is a pure TensorFlow function that runs inside a tf.data graph. The device does the
rest: normalisation, mixing, and random erasing, which fills in noise after normalisation.
"""

import tensorflow as tf

from beit_jax.config import ClassifyAugmentConfig
from beit_jax.data import augment, rand_augment, resizing
from beit_jax.data.tracing import traced_once
from beit_jax.preprocessing import eval_shorter_side, fill_color

Parameters = dict[str, tf.Tensor | rand_augment.Parameters]


def draw_parameters(
    key: tf.Tensor, *, height: tf.Tensor, width: tf.Tensor, config: ClassifyAugmentConfig
) -> Parameters:
    """Draws one image's crop box, flip and operations.

    Args:
      key: int64 [2]; the result is a pure function of it and of the size.
      height, width: int32 scalars, the image's size in pixels.
      config: ranges and probabilities.

    Returns:
      A dict of
        box: int32 [4], top, left, height, width.
        flip: bool scalar; the crop is flipped.
        operations: as `rand_augment.draw` returns them.
    """
    crop_key, operations_key = tf.unstack(tf.random.split(key, num=2, alg="philox"))
    tries = augment.CROP_TRIES
    uniform = tf.random.stateless_uniform([3 + 2 * tries], seed=crop_key, alg="philox")
    box = augment.crop_box(
        uniform[3 : 3 + tries],
        uniform[3 + tries :],
        uniform[1:3],
        height=height,
        width=width,
        config=config,
    )
    return {
        "box": box,
        "flip": (uniform[0] < 0.5) if config.flip else tf.constant(False),
        "operations": rand_augment.draw(operations_key, config=config),
    }


def apply_parameters(
    image: tf.Tensor,
    *,
    parameters: Parameters,
    image_size: int,
    interpolation: str,
    normalization: str,
) -> tf.Tensor:
    """Applies drawn parameters.

    Args:
      image: uint8 [h, w, 3].
      parameters: as `draw_parameters` returns them.
      image_size: s, side of the view in pixels.
      interpolation: of the crop, "bicubic" or "bilinear"; antialiased both.
      normalization: a key of `preprocessing.NORMALIZATIONS`, with whose mean geometric operations
        fill gaps.

    Returns:
      uint8 [s, s, 3].
    """
    top, left, height, width = tf.unstack(parameters["box"])
    crop = image[top : top + height, left : left + width]
    view = resizing.resize(crop, size=image_size, method=interpolation)
    view = augment.flip_if(view, flip=parameters["flip"])
    view = rand_augment.apply(
        view, parameters=parameters["operations"], fill=fill_color(normalization)
    )
    return tf.ensure_shape(view, [image_size, image_size, 3])


@traced_once
def training_view(
    image: tf.Tensor,
    key: tf.Tensor,
    *,
    config: ClassifyAugmentConfig,
    image_size: int,
    normalization: str,
) -> tf.Tensor:
    """An image's view for training, before random erasing.

    Args:
      image: uint8 [h, w, 3].
      key: int64 [2]; the view is a pure function of it and of the image.
      config: crop, interpolation, flip and RandAugment.
      image_size: s, side of the view in pixels.
      normalization: a key of `preprocessing.NORMALIZATIONS`, with whose mean geometric operations
        fill gaps.

    Returns:
      uint8 [s, s, 3].
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    return apply_parameters(
        image,
        parameters=draw_parameters(key, height=height, width=width, config=config),
        image_size=image_size,
        interpolation=config.interpolation,
        normalization=normalization,
    )


@traced_once
def eval_view(image: tf.Tensor, *, image_size: int, crop: float | None = None) -> tf.Tensor:
    """The centre of the image after resizing its shorter side with bicubic interpolation.

    Only the pixels of the crop are computed, so that a very long image needs no more memory.

    Args:
      image: uint8 [h, w, 3].
      image_size: s, side of the view in pixels.
      crop: the view's share of the resized shorter side, as for `eval_shorter_side`.

    Returns:
      uint8 [s, s, 3].
    """
    shorter = eval_shorter_side(image_size, crop=crop)
    size = tf.shape(image)[:2]
    # Torchvision's rule for the longer side; int64, since a side times `shorter` may be large.
    size = tf.cast(size, tf.int64)
    resized = size * shorter // tf.reduce_min(size)
    # Halves are rounded to even, as Python's round does.
    corner = tf.round(tf.cast(resized - image_size, tf.float64) / 2)
    # The operation that tf.image.resize calls, with the crop's corner moved to the origin.
    view = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=[image_size, image_size],
        scale=tf.cast(resized / size, tf.float32),
        translation=-tf.cast(corner, tf.float32),
        kernel_type="keyscubic",
        antialias=True,
    )[0]
    view = tf.cast(tf.clip_by_value(tf.round(view), 0.0, 255.0), tf.uint8)
    return tf.ensure_shape(view, [image_size, image_size, 3])
