"""From an image with its label map to the view that segmentation trains on.

As mmseg 0.11's pipeline has it, in its order: a random scale, a random crop of which no class has
more than a share, a horizontal flip, photometric distortion, and padding at the right and at the
bottom. Drawing and applying are separate functions; together they are

    view = training_view(image, labels, key, config=SegmentDataConfig(source="pairs:..."))

Nothing outside the crop is resized: where it lies follows from the sizes, and from the label map,
which costs little. Everything here is a pure TensorFlow function that runs inside a tf.data graph.
The device normalises and sets the padding to the mean colour.
"""

import tensorflow as tf

from beit_jax.config import SegmentDataConfig
from beit_jax.config.segment import IGNORE
from beit_jax.data import augment, photometric
from beit_jax.data.resizing import to_levels
from beit_jax.data.tracing import traced_once

Parameters = dict[str, tf.Tensor | photometric.Parameters]

# Crops that are drawn before one is taken unseen (mmseg's RandomCrop).
CROP_TRIES = 10


def draw_parameters(key: tf.Tensor, *, config: SegmentDataConfig) -> Parameters:
    """Draws one image's scale, crops, flip and distortion.

    Args:
      key: int64 [2]; the result is a pure function of it.
      config: ranges and probabilities.

    Returns:
      A dict of
        scale: float64 scalar, a factor of `config.shorter` and `config.longer`.
        corners: float64 [11, 2] in 0..1: where crops begin, of the room that there is.
        flip: bool scalar; the crop is flipped.
        photometric: as `photometric.draw` returns them.
    """
    own_key, photometric_key = tf.unstack(tf.random.split(key, num=2, alg="philox"))
    uniform = tf.random.stateless_uniform(
        [2 + 2 * (CROP_TRIES + 1)], seed=own_key, alg="philox", dtype=tf.float64
    )
    low, high = config.augment.min_scale, config.augment.max_scale
    return {
        "scale": low + (high - low) * uniform[0],
        "corners": tf.reshape(uniform[2:], [CROP_TRIES + 1, 2]),
        "flip": (uniform[1] < 0.5) if config.augment.flip else tf.constant(False),
        "photometric": photometric.draw(photometric_key, config=config.augment),
    }


def scaled_size(size: tf.Tensor, *, scale: tf.Tensor, config: SegmentDataConfig) -> tf.Tensor:
    """The size to which an image is resized, with its shape kept (mmcv's `imrescale`).

    Args:
      size: int32 [2], height and width.
      scale: float64 scalar, a factor of the sides in the settings, which then lose their fraction.
      config: the sides.

    Returns:
      int32 [2], at least one pixel each. (mmcv fails for less.)
    """
    sides = tf.cast(size, tf.float64)
    longer = tf.maximum(tf.floor(config.longer * scale), 1)
    shorter = tf.maximum(tf.floor(config.shorter * scale), 1)
    factor = tf.minimum(longer / tf.reduce_max(sides), shorter / tf.reduce_min(sides))
    return tf.cast(tf.maximum(tf.floor(sides * factor + 0.5), 1), tf.int32)


def choose_crop(
    labels: tf.Tensor,
    *,
    size: tf.Tensor,
    corners: tf.Tensor,
    side: int,
    max_class_share: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The first crop in which no class has more than its share, or the last one.

    Args:
      labels: uint8 [h, w], classes, 255 where ignored.
      size: int32 [2], to which the map is resized.
      corners: float64 [n, 2] in 0..1, as `draw_parameters` returns them. The last crop is not
        looked at.
      side: of the crop in pixels; a smaller image is taken whole.
      max_class_share: of the labelled pixels; there must be two classes. 1: the first crop is
        taken.

    Returns:
      The box, int32 [4] (top, left, height, width) in the resized image, and the classes in it,
      uint8 [height, width].
    """
    extent = tf.minimum(size, side)
    room = size - extent

    def at(number: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
        corner = tf.cast(tf.floor(corners[number] * tf.cast(room + 1, tf.float64)), tf.int32)
        box = tf.concat([tf.minimum(corner, room), extent], 0)
        return box, _nearest(labels, box=box, size=size)

    box, crop = at(0)
    if max_class_share == 1:
        return box, crop
    last = corners.shape[0] - 1

    def goes_on(number: tf.Tensor, box: tf.Tensor, crop: tf.Tensor) -> tf.Tensor:
        return (number < last) & ~_is_mixed(crop, max_class_share=max_class_share)

    def another(
        number: tf.Tensor, box: tf.Tensor, crop: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return (number + 1, *at(number + 1))

    _, box, crop = tf.while_loop(goes_on, another, (tf.constant(0), box, crop))
    return box, crop


def _is_mixed(crop: tf.Tensor, *, max_class_share: float) -> tf.Tensor:
    """Whether there are two classes, of which none has so large a share of the labelled pixels."""
    counts = tf.math.bincount(
        tf.reshape(tf.cast(crop, tf.int32), [-1]), minlength=IGNORE + 1, maxlength=IGNORE + 1
    )[:IGNORE]
    share = tf.reduce_max(counts) / tf.maximum(tf.reduce_sum(counts), 1)  # float64
    return (tf.math.count_nonzero(counts) > 1) & (share < max_class_share)


def _nearest(labels: tf.Tensor, *, box: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """A box of the resized map: every pixel is the one at or before it (cv2's INTER_NEAREST)."""
    full = tf.shape(labels)
    first, last = box[:2], box[:2] + box[2:]

    def sources(axis: int) -> tf.Tensor:
        position = tf.cast(tf.range(first[axis], last[axis]), tf.float64)
        position = tf.floor(position * _step(full[axis], size[axis]))
        return tf.minimum(tf.cast(position, tf.int32), full[axis] - 1)

    return tf.gather(tf.gather(labels, sources(0)), sources(1), axis=1)


def _step(full: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """From one pixel of the resized image to the next, in pixels of the image; float64 scalar.

    OpenCV's is the reciprocal of a quotient, which in one size of 25 leads to another pixel than
    the quotient turned round. Of this kind of division TensorFlow's optimiser leaves both.
    """
    return tf.math.reciprocal(
        tf.math.divide_no_nan(tf.cast(size, tf.float64), tf.cast(full, tf.float64))
    )


def resize_box(image: tf.Tensor, *, box: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """A box of an image that is resized without antialiasing, as with cv2's INTER_LINEAR.

    OpenCV's own result depends on the processor: it drops bits on the way, and is up to one level
    darker. Rows and columns are resized one after the other, with the image transposed
    between, as in `resizing.py`: whole rows are mixed.

    Args:
      image: uint8 [h, w, 3].
      box: int32 [4], top, left, height and width, in the resized image.
      size: int32 [2], of the resized image.

    Returns:
      uint8 [height, width, 3].
    """
    full = tf.shape(image)
    top, left, height, width = tf.unstack(box)
    upper, lower, at_row = _neighbours(top, height, full=full[0], size=size[0])
    before, after, at_column = _neighbours(left, width, full=full[1], size=size[1])
    start, end = before[0], after[-1] + 1
    part = image[upper[0] : lower[-1] + 1, start:end]
    flat = tf.reshape(part, [lower[-1] + 1 - upper[0], 3 * (end - start)])
    rows = _mix(flat, upper - upper[0], lower - upper[0], at_row)
    turned = tf.reshape(tf.transpose(rows), [end - start, 3 * height])
    columns = _mix(turned, before - start, after - start, at_column)
    levels = to_levels(tf.reshape(columns, [3 * width, height]), offset=0.0)
    return tf.reshape(tf.transpose(levels), [height, width, 3])


def _neighbours(
    first: tf.Tensor, number: tf.Tensor, *, full: tf.Tensor, size: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The two pixels between which each new one lies, int32, and where between them, float32."""
    position = tf.cast(tf.range(first, first + number), tf.float64)
    position = (position + 0.5) * _step(full, size) - 0.5
    position = tf.clip_by_value(position, 0, tf.cast(full, tf.float64) - 1)
    before = tf.cast(tf.floor(position), tf.int32)
    at = tf.cast(position - tf.floor(position), tf.float32)
    return before, tf.minimum(before + 1, full - 1), at


def _mix(rows: tf.Tensor, first: tf.Tensor, second: tf.Tensor, at: tf.Tensor) -> tf.Tensor:
    """Rows [n] between `first` and `second` of [m, k]; float32 [n, k]."""
    one = tf.cast(tf.gather(rows, first), tf.float32)
    other = tf.cast(tf.gather(rows, second), tf.float32)
    return one + (other - one) * at[:, None]


def apply_parameters(
    image: tf.Tensor, labels: tf.Tensor, *, parameters: Parameters, config: SegmentDataConfig
) -> dict[str, tf.Tensor]:
    """Applies drawn parameters.

    Args:
      image: uint8 [h, w, 3].
      labels: uint8 [h, w], classes, 255 where ignored.
      parameters: as `draw_parameters` returns them.
      config: s = `image_size`, sides and ranges.

    Returns:
      As `training_view` does.
    """
    side = config.image_size
    size = scaled_size(tf.shape(image)[:2], scale=parameters["scale"], config=config)
    box, crop = choose_crop(
        labels,
        size=size,
        corners=parameters["corners"],
        side=side,
        max_class_share=config.augment.max_class_share,
    )
    view = resize_box(image, box=box, size=size)
    view = photometric.apply(view, parameters=parameters["photometric"])
    view = augment.flip_if(view, flip=parameters["flip"])
    crop = augment.flip_if(crop, flip=parameters["flip"])
    below, beside = tf.unstack(side - box[2:])
    view = tf.pad(view, [[0, below], [0, beside], [0, 0]])
    crop = tf.pad(crop, [[0, below], [0, beside]], constant_values=tf.constant(IGNORE, tf.uint8))
    return {
        "image": tf.ensure_shape(view, [side, side, 3]),
        "segmentation": tf.ensure_shape(crop, [side, side]),
        "size": box[2:],
    }


@traced_once
def training_view(
    image: tf.Tensor, labels: tf.Tensor, key: tf.Tensor, *, config: SegmentDataConfig
) -> dict[str, tf.Tensor]:
    """An image's view for training.

    Args:
      image: uint8 [h, w, 3].
      labels: uint8 [h, w], classes, 255 where ignored.
      key: int64 [2]; the view is a pure function of it, of the image and of the map.
      config: s = `image_size`, sides and ranges.

    Returns:
      `image` uint8 [s, s, 3], RGB; `segmentation` uint8 [s, s]; `size` int32 [2], height and width
      of what is image: the rest, at the right and at the bottom, is padding, 0 in the image and 255
      in the map.
    """
    return apply_parameters(
        image, labels, parameters=draw_parameters(key, config=config), config=config
    )
