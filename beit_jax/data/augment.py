"""From a decoded image to the two views: for the encoder, and for the tokenizer.

In training, in the official order: colour jitter (brightness, contrast and saturation in random
order), a horizontal flip, and one random crop box that both views share. View 1 is the box resized
with bicubic interpolation, view 2 the same box resized with Lanczos, both antialiased. Drawing and
applying are separate functions, so that a test can fix the box and the jitter:

    parameters = draw_parameters(key, height=375, width=500, config=AugmentConfig())
    views = apply_views(image, parameters=parameters, image_size=224, token_image_size=112)

Everything here is a pure TensorFlow function that runs inside a tf.data graph. It follows Pillow. A
view differs from Pillow's by about 0.35 of 255 in the mean, for these reasons:

- Only the crop is jittered, and contrast's mean comes from evenly spaced rows of the image
  (`data/jitter.py`).
- Pillow truncates to integers after each step of the jitter; here half a level is subtracted, which
  is the same on average. Clipping comes before resizing, as in Pillow.
- Resizing rounds once, at the end; Pillow also rounds between its two passes.

With `fidelity="fast"` (`fast_views`) only the crop was decoded, the device does the jitter
(`training/device_jitter.py`), and view 2 is made from view 1.
"""

import math

import tensorflow as tf

from beit_jax.config import AugmentConfig, ClassifyAugmentConfig
from beit_jax.data import jitter, resizing
from beit_jax.data.tracing import traced_once
from beit_jax.preprocessing import JITTER_FIELDS

# Official RandomResizedCrop defaults: ten tries, aspect (width / height) log-uniform in 3/4..4/3.
CROP_TRIES = 10
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3

Parameters = dict[str, tf.Tensor]


@traced_once
def draw_parameters(
    key: tf.Tensor, *, height: tf.Tensor, width: tf.Tensor, config: AugmentConfig
) -> Parameters:
    """Draws one image's jitter, flip and crop box.

    Args:
      key: int64 [2]; the result is a pure function of it and of the size.
      height, width: int32 scalars, the image's size in pixels.
      config: ranges.

    Returns:
      A dict of
        factors: float32 [3], of brightness, contrast and saturation; U[1 - x, 1 + x].
        order: int32 [3], a permutation: the operations in the order in which they are applied.
        flip: bool scalar.
        box: int32 [4], top, left, height, width, in the flipped image's coordinates.
    """
    tries = CROP_TRIES
    uniform = _draw_uniform(key)
    box = crop_box(
        uniform[9 : 9 + tries],
        uniform[9 + tries :],
        uniform[7:9],
        height=height,
        width=width,
        config=config,
    )
    return _jitter_and_flip(uniform, config=config) | {"box": box}


@traced_once
def draw_jitter_and_flip(key: tf.Tensor, *, config: AugmentConfig) -> Parameters:
    """Draws what does not depend on the image's size: `draw_parameters` without the box."""
    return _jitter_and_flip(_draw_uniform(key), config=config)


def _draw_uniform(key: tf.Tensor) -> tf.Tensor:
    return tf.random.stateless_uniform([9 + 2 * CROP_TRIES], seed=key, alg="philox")


def _jitter_and_flip(uniform: tf.Tensor, *, config: AugmentConfig) -> Parameters:
    spread = tf.constant([config.brightness, config.contrast, config.saturation], tf.float32)
    return {
        "factors": 1 + spread * (2 * uniform[0:3] - 1),
        "order": tf.argsort(uniform[3:6]),
        "flip": (uniform[6] < 0.5) if config.flip else tf.constant(False),
    }


def crop_box(
    area_uniform: tf.Tensor,
    aspect_uniform: tf.Tensor,
    corner_uniform: tf.Tensor,
    *,
    height: tf.Tensor,
    width: tf.Tensor,
    config: AugmentConfig | ClassifyAugmentConfig,
) -> tf.Tensor:
    """Torchvision's random crop box, from uniform numbers in [0, 1).

    The first try that fits the image is taken; where none does, the largest centred box of an
    allowed aspect.

    Args:
      area_uniform, aspect_uniform: float32 [tries], for the box's area and aspect.
      corner_uniform: float32 [2], for top and left.
      height, width: int32 scalars, the image's size in pixels.
      config: the range of the crop's share of the area.

    Returns:
      int32 [4]: top, left, height, width.
    """
    full_height, full_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    low, high = config.min_crop_scale, config.max_crop_scale
    area = full_height * full_width * (low + (high - low) * area_uniform)
    low, high = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    aspect = tf.exp(low + (high - low) * aspect_uniform)
    # tf.round rounds halves to even, as Python's round does.
    crop_width = tf.round(tf.sqrt(area * aspect))
    crop_height = tf.round(tf.sqrt(area / aspect))
    fits = (
        (crop_width > 0)
        & (crop_width <= full_width)
        & (crop_height > 0)
        & (crop_height <= full_height)
    )
    first = tf.argmax(fits)  # the first True
    size = tf.stack([crop_height[first], crop_width[first]])
    room = tf.stack([full_height, full_width]) - size
    corner = tf.minimum(tf.floor(corner_uniform * (room + 1)), room)

    fallback = tf.stack(
        [
            tf.minimum(full_height, tf.round(full_width / MIN_ASPECT)),
            tf.minimum(full_width, tf.round(full_height * MAX_ASPECT)),
        ]
    )
    centred = (tf.stack([full_height, full_width]) - fallback) // 2
    found = fits[first]
    box = tf.where(found, tf.concat([corner, size], 0), tf.concat([centred, fallback], 0))
    return tf.cast(box, tf.int32)


@traced_once
def apply_views(
    image: tf.Tensor,
    *,
    parameters: Parameters,
    image_size: int | None,
    token_image_size: int | None,
) -> dict[str, tf.Tensor]:
    """Applies drawn parameters and makes both views.

    The image is cropped first, and only the crop is jittered and flipped: all of the jitter except
    contrast's mean is per pixel, and the mean is taken from the full image.

    Args:
      image: uint8 [h, w, 3].
      parameters: as `draw_parameters` returns them.
      image_size, token_image_size: sides of the views in pixels; None leaves a view out.

    Returns:
      A dict of `image`, uint8 [image_size, image_size, 3], and `token_image`, uint8
      [token_image_size, token_image_size, 3].
    """
    crop = _crop(image, parameters=parameters)
    steps = jitter.jitter_steps(image, factors=parameters["factors"], order=parameters["order"])
    return _resize_views(
        jitter.apply_jitter(crop, steps=steps),
        flip=parameters["flip"],
        offset=steps.offset,
        image_size=image_size,
        token_image_size=token_image_size,
    )


@traced_once
def fast_views(
    crop: tf.Tensor,
    *,
    parameters: Parameters,
    image_size: int | None,
    token_image_size: int | None,
) -> dict[str, tf.Tensor]:
    """Both views, without the jitter, of an image of which only the crop was decoded.

    View 2 is view 1 before rounding, resized once more with Lanczos.

    Args:
      crop: uint8 [h, w, 3], the drawn box, perhaps at a lower resolution.
      parameters: as `draw_parameters` returns them; flip, factors and order are used.
      image_size, token_image_size: sides of the views in pixels; None leaves a view out.

    Returns:
      As `apply_views` does, with `factors`, float32 [3], and `order`, int32 [3], for the jitter on
      the device.
    """
    views = {name: parameters[name] for name in JITTER_FIELDS}
    flip = parameters["flip"]
    if image_size is None or token_image_size is None:
        return views | _resize_views(
            crop, flip=flip, offset=0.0, image_size=image_size, token_image_size=token_image_size
        )
    transposed = resizing.resize_transposed(crop, size=image_size, method="bicubic")
    views["image"] = flip_if(resizing.to_levels_transposed(transposed, offset=0.0), flip=flip)
    smaller = resizing.resize_back(transposed, size=token_image_size, method="lanczos3")
    views["token_image"] = flip_if(resizing.to_levels(smaller, offset=0.0), flip=flip)
    return views


def apply_segmentation(segmentation: tf.Tensor, *, parameters: Parameters, size: int) -> tf.Tensor:
    """Applies the same flip and crop to a segmentation map.

    Args:
      segmentation: uint8 [h, w], class ids.
      parameters: as `draw_parameters` returns them.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size]: class ids of the nearest pixels, never interpolated.
    """
    crop = flip_if(_crop(segmentation[..., None], parameters=parameters), flip=parameters["flip"])
    return _resize_segmentation(crop, size=size)


def eval_parameters(*, height: tf.Tensor, width: tf.Tensor) -> Parameters:
    """Parameters without jitter or flip, whose box is the largest centred square."""
    side = tf.minimum(height, width)
    return {
        "factors": tf.ones([3]),
        "order": tf.range(3),
        "flip": tf.constant(False),
        "box": tf.stack([(height - side) // 2, (width - side) // 2, side, side]),
    }


@traced_once
def eval_views(
    image: tf.Tensor, *, image_size: int | None, token_image_size: int | None
) -> dict[str, tf.Tensor]:
    """Both views of the largest centred square, without anything random; see `apply_views`."""
    height, width = tf.unstack(tf.shape(image)[:2])
    crop = _crop(image, parameters=eval_parameters(height=height, width=width))
    return _resize_views(
        crop,
        flip=tf.constant(False),
        offset=0.0,
        image_size=image_size,
        token_image_size=token_image_size,
    )


def unflipped_box(parameters: Parameters, *, width: tf.Tensor) -> tf.Tensor:
    """Maps the box from the flipped image's coordinates to those of the image itself.

    Args:
      parameters: as `draw_parameters` returns them.
      width: int32 scalar, of the image in pixels.

    Returns:
      int32 [4]: top, left, height, width.
    """
    box = parameters["box"]
    mirrored = tf.stack([box[0], width - box[1] - box[3], box[2], box[3]])
    return tf.where(parameters["flip"], mirrored, box)


def _crop(image: tf.Tensor, *, parameters: Parameters) -> tf.Tensor:
    """Crops the unflipped image to the box."""
    box = unflipped_box(parameters, width=tf.shape(image)[1])
    top, left, height, width = tf.unstack(box)
    return image[top : top + height, left : left + width]


def flip_if(image: tf.Tensor, *, flip: tf.Tensor) -> tf.Tensor:
    """The image [h, w, c], mirrored left to right where `flip`, bool scalar, is true."""
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def _resize_views(
    crop: tf.Tensor,
    *,
    flip: tf.Tensor,
    offset: tf.Tensor | float,
    image_size: int | None,
    token_image_size: int | None,
) -> dict[str, tf.Tensor]:
    views = {}
    for name, size, method in (
        ("image", image_size, "bicubic"),
        ("token_image", token_image_size, "lanczos3"),
    ):
        if size is not None:
            transposed = resizing.resize_transposed(crop, size=size, method=method)
            views[name] = flip_if(
                resizing.to_levels_transposed(transposed, offset=offset), flip=flip
            )
    return views


def _resize_segmentation(crop: tf.Tensor, *, size: int) -> tf.Tensor:
    resized = tf.image.resize(crop, [size, size], method="nearest")
    return tf.ensure_shape(resized[..., 0], [size, size])
