"""From a decoded image to the two views: for the encoder, and for the tokenizer.

In training, in the official order: colour jitter (brightness, contrast and saturation in random
order), a horizontal flip, and one random crop box that both views share; view 1 is the box resized
with bicubic interpolation, view 2 the same box with Lanczos, both antialiased. What is drawn is
apart from how it is applied, so that a test can fix the box and the jitter:

    parameters = draw_parameters(key, height=375, width=500, config=AugmentConfig())
    views = apply_views(image, parameters=parameters, image_size=224, token_image_size=112)

Everything here is a pure TensorFlow function that runs inside a tf.data graph. It follows Pillow,
with a view's mean absolute difference from Pillow's about 0.35 of 255, for these reasons:

- Only the crop is jittered, and contrast's mean comes from evenly spaced rows, about
  `MEAN_SAMPLES` pixels.
- Pillow truncates to integers after each step of the jitter. Here half a level is taken off, which
  is the same on average. Clipping stays where it was, before resizing. All of the jitter is then
  two clips and a product with a 3 x 3 matrix, see `JitterSteps`.
- Resizing rounds once, at the end, where Pillow also rounds between its two passes.

With `fidelity="fast"` (`fast_views`) the crop alone was decoded, the jitter is left to the device
(`training/device_jitter.py`), and view 2 is made from view 1.
"""

import dataclasses
import itertools
import math

import tensorflow as tf

from beit_jax.config import AugmentConfig, ClassifyAugmentConfig
from beit_jax.preprocessing import CONTRAST, JITTER_FIELDS, LUMA, SATURATION

# Official RandomResizedCrop defaults: ten tries, aspect (width / height) log-uniform in 3/4..4/3.
CROP_TRIES = 10
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3

# Pixels, about, from which contrast's grey mean is taken (all of them in a smaller image).
MEAN_SAMPLES = 1 << 15

# `resize`'s methods as ScaleAndTranslate calls them.
KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic", "lanczos3": "lanczos3"}

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
    """What `draw_parameters` draws, but the box: what does not depend on the image's size."""
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
    steps = jitter_steps(image, factors=parameters["factors"], order=parameters["order"])
    return _resize_views(
        apply_jitter(crop, steps=steps),
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
    """Both views of a crop that was cut out when it was decoded, without the jitter.

    View 2 is view 1, before it was rounded, resized once more with Lanczos.

    Args:
      crop: uint8 [h, w, 3], the drawn box or the same at a lower resolution.
      parameters: as `draw_parameters` returns them; flip, factors and order count.
      image_size, token_image_size: sides of the views in pixels; a view without is not made.

    Returns:
      As `apply_views` does, with `factors`, float32 [3], and `order`, int32 [3], of the jitter that
      is still to be done.
    """
    views = {name: parameters[name] for name in JITTER_FIELDS}
    flip = parameters["flip"]
    if image_size is None or token_image_size is None:
        return views | _resize_views(
            crop, flip=flip, offset=0.0, image_size=image_size, token_image_size=token_image_size
        )
    turned = _resize_turned(crop, size=image_size, method="bicubic")
    views["image"] = flip_if(_finish_turned(turned, offset=0.0), flip=flip)
    smaller = _resize_upright(turned, size=token_image_size, method="lanczos3")
    views["token_image"] = flip_if(_to_levels(smaller, offset=0.0), flip=flip)
    return views


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
    return _resize_views(
        crop,
        flip=tf.constant(False),
        offset=0.0,
        image_size=image_size,
        token_image_size=token_image_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JitterSteps:
    """All of an image's jitter as clip(clip(pixel, low, high) @ matrix, low, high) + offset.

    Brightness and contrast are affine functions of a channel, saturation is a matrix whose columns
    sum to one, and each clips to 0..255. Clips move through rising affine functions, so that one is
    left before the matrix and one after it, and what is added comes last: after resizing even,
    whose weights sum to one.

    Attributes:
      before, after: float32 [2], lowest and highest level.
      matrix: float32 [3, 3].
      offset: float32 scalar.
    """

    before: tf.Tensor
    matrix: tf.Tensor
    after: tf.Tensor
    offset: tf.Tensor


def jitter_steps(image: tf.Tensor, *, factors: tf.Tensor, order: tf.Tensor) -> JitterSteps:
    """What colour jitter does to this image.

    Args:
      image: uint8 [h, w, 3], all of it: contrast needs its mean.
      factors: float32 [3], of brightness, contrast and saturation.
      order: int32 [3], which of the three comes first, second, third.
    """
    sample = tf.cast(_sample(image), tf.float32)
    luma = tf.constant([[weight] * 3 for weight in LUMA])
    saturate = factors[SATURATION] * tf.eye(3) + (1 - factors[SATURATION]) * luma
    # Half a level less stands for truncation; a factor of one leaves whole numbers whole.
    truncation = tf.where(factors == 1, 0.0, -0.5)

    def steps(order: tuple[int, ...]) -> tf.Tensor:
        # Scale, shift and the bounds of what has been done since the matrix, or before it.
        identity = tf.constant([1.0, 0.0, 0.0, 255.0])
        before, since, pixels = identity, identity, sample
        for which in order:
            shift = truncation[which]
            if which == SATURATION:
                before, since = since, tf.stack([1.0, shift, 0.0, 255.0])
                if CONTRAST in order[order.index(which) :]:
                    pixels = _clip(tf.matmul(pixels, saturate) + shift, 0.0, 255.0)
                continue
            if which == CONTRAST:
                mean = tf.round(tf.reduce_mean(tf.matmul(pixels, luma)))
                shift += mean * (1 - factors[which])
            elif CONTRAST in order[order.index(which) :]:
                pixels = _clip(factors[which] * pixels + shift, 0.0, 255.0)
            since = since * factors[which] + shift * tf.constant([0.0, 1.0, 1.0, 1.0])
            since = tf.concat([since[:2], tf.clip_by_value(since[2:], 0.0, 255.0)], 0)
        # A factor of zero makes the image plain, which a tiny one does as well.
        scale = tf.maximum(before[0], 1e-6)
        offset = since[0] * before[1] + since[1]
        first, last = (before[2:] - before[1]) / scale, since[2:] - offset
        return tf.concat([first, last, [offset, scale * since[0]]], 0)

    place = 2 * order[0] + tf.cast(order[1] > order[2], tf.int32)
    orders = list(itertools.permutations(range(3)))
    found = tf.switch_case(place, [lambda each=each: steps(each) for each in orders])
    return JitterSteps(
        before=found[:2], matrix=found[5] * saturate, after=found[2:4], offset=found[4]
    )


def apply_jitter(pixels: tf.Tensor, *, steps: JitterSteps) -> tf.Tensor:
    """All of the jitter but its offset; uint8 [h, w, 3] → float32 [h, w, 3]."""
    flat = tf.cast(tf.reshape(pixels, [-1, 3]), tf.float32)
    flat = _clip(flat, steps.before[0], steps.before[1])
    flat = _clip(tf.matmul(flat, steps.matrix), steps.after[0], steps.after[1])
    return tf.reshape(flat, tf.shape(pixels))


def _sample(image: tf.Tensor) -> tf.Tensor:
    """Evenly spaced rows of the image with about MEAN_SAMPLES pixels, uint8 [n, 3]."""
    height, width = tf.unstack(tf.shape(image)[:2])
    stride = tf.clip_by_value(height * width // MEAN_SAMPLES, 1, height)
    return tf.reshape(tf.gather(image, tf.range(stride // 2, height, stride)), [-1, 3])


def _clip(pixels: tf.Tensor, low: tf.Tensor | float, high: tf.Tensor | float) -> tf.Tensor:
    """tf.clip_by_value in one pass over the pixels instead of two."""
    return tf.raw_ops.ClipByValue(t=pixels, clip_value_min=low, clip_value_max=high)


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
    """Pillow's convert("L"), exactly: of float32 [n, 3], thrice beside each other, float32 [n, 3].

    Whole numbers both: in units of 2**-16, every product and sum here is below 2**24.
    """
    # One small matmul is several times faster here than slicing channels and broadcasting.
    weights = tf.constant([[weight] * 3 for weight in LUMA])
    return tf.floor(tf.matmul(pixels, weights) + 0.5)


def unflipped_box(parameters: Parameters, *, width: tf.Tensor) -> tf.Tensor:
    """The box, drawn in the flipped image's coordinates, in those of the image as it is.

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
    """Cuts the box out of the unflipped image."""
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
            turned = _resize_turned(crop, size=size, method=method)
            views[name] = flip_if(_finish_turned(turned, offset=offset), flip=flip)
    return views


def resize(crop: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes to a square, with antialiasing, as tf.image.resize does but twice as fast.

    Args:
      crop: uint8 [h, w, 3].
      size: side of the result in pixels.
      method: a key of `KERNELS`.

    Returns:
      uint8 [size, size, 3]. Bicubic and Lanczos overshoot, hence the clip.
    """
    return _finish_turned(_resize_turned(crop, size=size, method=method), offset=0.0)


def _resize_turned(crop: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes, antialiased, and swaps rows with columns.

    TensorFlow resizes columns pixel by pixel but rows as long vectors, several times faster: so
    rows are resized, both sides swapped, and rows resized again.

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


def _resize_upright(turned: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes what `_resize_turned` gave and swaps it back: float32 [size, size, 3]."""
    width, channels, height = turned.shape
    resized = _resize_rows(tf.reshape(turned, [width, channels * height]), size=size, method=method)
    resized = tf.transpose(tf.reshape(resized, [size * channels, height]))
    resized = _resize_rows(resized, size=size, method=method)
    return tf.reshape(resized, [size, size, channels])


def _resize_rows(values: tf.Tensor, *, size: int, method: str) -> tf.Tensor:
    """Resizes [n, m] to [size, m], each column for itself; float32."""
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


def _finish_turned(turned: tf.Tensor, *, offset: tf.Tensor | float) -> tf.Tensor:
    """[columns, 3, rows] → uint8 [rows, columns, 3]."""
    size = turned.shape[0]
    levels = _to_levels(tf.reshape(turned, [size * 3, size]), offset=offset)
    return tf.reshape(tf.transpose(levels), [size, size, 3])


def _to_levels(values: tf.Tensor, *, offset: tf.Tensor | float) -> tf.Tensor:
    """Rounds float32, and `offset` more, to uint8."""
    return tf.cast(_clip(values + (offset + 0.5), 0.0, 255.0), tf.uint8)


def _resize_segmentation(crop: tf.Tensor, *, size: int) -> tf.Tensor:
    resized = tf.image.resize(crop, [size, size], method="nearest")
    return tf.ensure_shape(resized[..., 0], [size, size])
