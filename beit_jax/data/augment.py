"""From a decoded image to the two views: for the encoder, and for the tokenizer.

In training, in the official order: colour jitter (brightness, contrast and saturation in random
order), a horizontal flip, and one random crop box that both views share; view 1 is the box resized
with bicubic interpolation, view 2 the same box with Lanczos, both antialiased. What is drawn is
apart from how it is applied, so that a test can fix the box and the jitter:

    parameters = draw_parameters(key, height=375, width=500, config=AugmentConfig())
    views = apply_views(image, parameters=parameters, image_size=224, token_image_size=112)

Everything here is a pure TensorFlow function that runs inside a tf.data graph. Arithmetic follows
Pillow: after each step of the jitter, values are truncated to integers in 0..255. Two differences:
contrast's mean comes from a grid of at least `MEAN_SAMPLES` pixels (a photograph's mean is then off
by about 0.2 of 255, and a pixel by at most 0.4 of that), and resizing rounds once at the end where
Pillow also rounds between its two passes.
"""

import math

import tensorflow as tf

from beit_jax.config import AugmentConfig, ClassifyAugmentConfig

# Official RandomResizedCrop defaults: ten tries, aspect (width / height) log-uniform in 3/4..4/3.
CROP_TRIES = 10
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3

# Positions in `factors` and values in `order`.
BRIGHTNESS, CONTRAST, SATURATION = range(3)

# ITU-R 601 luma as Pillow's convert("L") has it: integers over 2**16.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)

# Pixels, at least, from which contrast's grey mean is taken (all of them in a smaller image).
MEAN_SAMPLES = 128 * 128

Parameters = dict[str, tf.Tensor]

# Traced once for all pipelines of a process, which makes a new pipeline start sooner.
traced_once = tf.function(autograph=False, reduce_retracing=True)


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
        order: int32 [3], a permutation: which of the three comes first, second, third.
        flip: bool scalar.
        box: int32 [4], top, left, height, width, in the flipped image's coordinates.
    """
    tries = CROP_TRIES
    uniform = tf.random.stateless_uniform([9 + 2 * tries], seed=key, alg="philox")
    spread = tf.constant([config.brightness, config.contrast, config.saturation], tf.float32)
    box = crop_box(
        uniform[9 : 9 + tries],
        uniform[9 + tries :],
        uniform[7:9],
        height=height,
        width=width,
        config=config,
    )
    return {
        "factors": 1 + spread * (2 * uniform[0:3] - 1),
        "order": tf.argsort(uniform[3:6]),
        "flip": (uniform[6] < 0.5) if config.flip else tf.constant(False),
        "box": box,
    }


def crop_box(
    area_uniform: tf.Tensor,
    aspect_uniform: tf.Tensor,
    place_uniform: tf.Tensor,
    *,
    height: tf.Tensor,
    width: tf.Tensor,
    config: AugmentConfig | ClassifyAugmentConfig,
) -> tf.Tensor:
    """Torchvision's random crop box from uniform numbers in [0, 1).

    The first of the tries that fits the image is taken; where none does, the largest centred box
    of an allowed aspect.

    Args:
      area_uniform, aspect_uniform: float32 [tries].
      place_uniform: float32 [2], of top and left.
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
    corner = tf.minimum(tf.floor(place_uniform * (room + 1)), room)

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

    The crop is cut first and only it is jittered and flipped: all of the jitter but contrast's mean
    is per pixel, and the mean is taken from the full image.

    Args:
      image: uint8 [h, w, 3].
      parameters: as `draw_parameters` returns them.
      image_size, token_image_size: sides of the views in pixels; a view without is not made.

    Returns:
      A dict of `image`, uint8 [image_size, image_size, 3], and `token_image`, uint8
      [token_image_size, token_image_size, 3].
    """
    crop = _crop(image, parameters=parameters)
    factors = parameters["factors"]
    crop = tf.cond(
        tf.reduce_all(factors == 1),
        lambda: crop,
        lambda: _jitter(crop, image, factors=factors, order=parameters["order"]),
    )
    return _resize_views(
        flip_if(crop, flip=parameters["flip"]),
        image_size=image_size,
        token_image_size=token_image_size,
    )


def apply_segmentation(segmentation: tf.Tensor, *, parameters: Parameters, size: int) -> tf.Tensor:
    """The same flip and crop for a segmentation map.

    Args:
      segmentation: uint8 [h, w], class ids.
      parameters: as `draw_parameters` returns them.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size]: ids of the nearest pixels, never mixtures.
    """
    crop = flip_if(_crop(segmentation[..., None], parameters=parameters), flip=parameters["flip"])
    return _resize_segmentation(crop, size=size)


def eval_parameters(*, height: tf.Tensor, width: tf.Tensor) -> Parameters:
    """No jitter, no flip, and the centred square of the shorter side as the box."""
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
    """Both views of the centred square, without anything random; as `apply_views` otherwise."""
    height, width = tf.unstack(tf.shape(image)[:2])
    crop = _crop(image, parameters=eval_parameters(height=height, width=width))
    return _resize_views(crop, image_size=image_size, token_image_size=token_image_size)


def jitter(image: tf.Tensor, *, factors: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Colour jitter of a whole image.

    Args:
      image: uint8 [h, w, 3].
      factors: float32 [3], of brightness, contrast and saturation.
      order: int32 [3], which of the three comes first, second, third.

    Returns:
      uint8 [h, w, 3].
    """
    return _jitter(image, image, factors=factors, order=order)


def _jitter(
    crop: tf.Tensor, image: tf.Tensor, *, factors: tf.Tensor, order: tf.Tensor
) -> tf.Tensor:
    """Jitters `crop` as a part of `image`; both uint8 [., ., 3]."""
    height, width = tf.unstack(tf.shape(image)[:2])
    stride = tf.sqrt(tf.cast(height * width, tf.float32) / MEAN_SAMPLES)
    stride = tf.maximum(tf.cast(stride, tf.int32), 1)
    sample = tf.reshape(image[::stride, ::stride], [-1, 3])
    pixels = tf.reshape(crop, [-1, 3])
    # The sample goes through the same steps, so that contrast sees what came before it.
    pixels, sample = tf.cast(pixels, tf.float32), tf.cast(sample, tf.float32)
    for place in range(3):
        which = order[place]
        factor = factors[which]
        pixels, sample = tf.switch_case(
            which,
            [
                lambda p=pixels, s=sample, f=factor: (_brightness(p, f), _brightness(s, f)),
                lambda p=pixels, s=sample, f=factor: _contrast(p, s, f),
                lambda p=pixels, s=sample, f=factor: (_saturation(p, f), _saturation(s, f)),
            ],
        )
    return tf.reshape(tf.cast(pixels, tf.uint8), tf.shape(crop))


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


def _brightness(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`blend` with black, in fewer passes."""
    return tf.floor(tf.minimum(factor * pixels, 255.0))


def grey(pixels: tf.Tensor) -> tf.Tensor:
    """Pillow's convert("L"), exactly: of float32 [n, 3], thrice beside each other, float32 [n, 3].

    Whole numbers both: in units of 2**-16, every product and sum here is below 2**24.
    """
    # One small matmul is several times faster here than slicing channels and broadcasting.
    weights = tf.constant([[weight] * 3 for weight in LUMA])
    return tf.floor(tf.matmul(pixels, weights) + 0.5)


def _contrast(
    pixels: tf.Tensor, sample: tf.Tensor, factor: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    mean = tf.floor(tf.reduce_mean(grey(sample)) + 0.5)
    return blend(pixels, mean, factor), blend(sample, mean, factor)


def _saturation(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return blend(pixels, grey(pixels), factor)


def _crop(image: tf.Tensor, *, parameters: Parameters) -> tf.Tensor:
    """Cuts the box, given in the flipped image's coordinates, out of the unflipped image."""
    top, left, height, width = tf.unstack(parameters["box"])
    left = tf.where(parameters["flip"], tf.shape(image)[1] - left - width, left)
    return image[top : top + height, left : left + width]


def flip_if(image: tf.Tensor, *, flip: tf.Tensor) -> tf.Tensor:
    """The image [h, w, c], mirrored left to right where `flip`, bool scalar, is true."""
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def _resize_views(
    crop: tf.Tensor, *, image_size: int | None, token_image_size: int | None
) -> dict[str, tf.Tensor]:
    views = {}
    if image_size is not None:
        views["image"] = resize(crop, size=image_size, method="bicubic")
    if token_image_size is not None:
        views["token_image"] = resize(crop, size=token_image_size, method="lanczos3")
    return views


def resize(crop: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes to a square, with antialiasing.

    Args:
      crop: uint8 [h, w, 3].
      size: side of the result in pixels.
      method: as tf.image.resize has it: "bilinear", "bicubic", "lanczos3".

    Returns:
      uint8 [size, size, 3]. Bicubic and Lanczos overshoot, hence the clip.
    """
    resized = tf.image.resize(crop, [size, size], method=method, antialias=True)
    resized = tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)
    return tf.ensure_shape(resized, [size, size, 3])


def _resize_segmentation(crop: tf.Tensor, *, size: int) -> tf.Tensor:
    resized = tf.image.resize(crop, [size, size], method="nearest")
    return tf.ensure_shape(resized[..., 0], [size, size])
