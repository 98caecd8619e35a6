"""From the bytes of an image file to pixels, or to just the window of pixels that is needed.

    image = decode_image(data, exif_orientation=True)  # uint8 [h, w, 3]
    crop = decode_window(data, window=Window(box=box, side=224), exif_orientation=True)

TensorFlow decodes JPEG and those PNG and WebP files that it decodes right; everything else goes
through Pillow (`by_pillow.py`). The content tells which, never the name. This module adds what
TensorFlow's decoders lack: EXIF orientation, a limit on pixels, a safe call for WebP, and decoding
only a window of a JPEG at the resolution that the view needs. Everything here runs inside a tf.data
graph.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import script_ops

from beit_jax.data.by_pillow import decode_by_pillow, is_left_to_tensorflow
from beit_jax.data.tracing import traced_once
from beit_jax.preprocessing import MAX_PIXELS

# What a folder lists as images. Their content may be of any format that is read.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The part of an image that a view needs, so that the rest is not decoded.

    Attributes:
      box: a function from the upright image's height and width (int32 scalars) to the window's
        top, left, height and width (int32 [4]).
      side: the least number of pixels that the window's shorter side must keep. A window of twice
        that side or more may be decoded at half the resolution, of four times at a quarter, and so
        on.
    """

    box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    side: int


def decode_image(
    data: tf.Tensor, *, exif_orientation: bool, max_pixels: int = MAX_PIXELS
) -> tf.Tensor:
    """Decodes an image file, of an animation the first frame, as Pillow's convert("RGB") does.

    Transparency is dropped: a transparent pixel shows the colour that is stored under it. 16-bit
    channels keep their high 8 bits. JPEG uses the accurate inverse DCT, which equals Pillow's bit
    for bit.

    Args:
      data: string scalar, the file's content.
      exif_orientation: turn images upright as PIL.ImageOps.exif_transpose does. (The official
        loader does not.)
      max_pixels: height times width may not exceed it; compared before anything is decoded.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: the data is incomplete, of no format that is read, or has too
        many pixels.
    """
    image, _ = _decode(data, exif_orientation=exif_orientation, max_pixels=max_pixels)
    return image


@traced_once
def _decode(
    data: tf.Tensor, *, exif_orientation: bool, max_pixels: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """`decode_image`, and whether Pillow had to do it, bool scalar."""

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
        with tf.control_dependencies([_check_pixels(height, width, max_pixels=max_pixels)]):
            image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return (_turn_upright(image, data) if exif_orientation else image), tf.constant(False)

    def other() -> tuple[tf.Tensor, tf.Tensor]:
        # (What tf.numpy_function makes, but with a name that other processes know, see below.)
        arguments = [data, tf.constant(exif_orientation), tf.constant(max_pixels, tf.int64)]
        made = tf.raw_ops.PyFuncStateless(input=arguments, token=_OTHER, Tout=[tf.uint8, tf.string])
        with tf.control_dependencies([tf.debugging.Assert(made[1] == b"", [made[1]])]):
            image = tf.ensure_shape(made[0], [None, None, 3])
        left = tf.size(image) == 0

        def decoded() -> tf.Tensor:
            return tf.cond(_starts_with(data, b"RIFF"), lambda: _decode_webp(data), png)

        def png() -> tf.Tensor:
            return tf.io.decode_png(data, channels=3)

        return tf.cond(left, decoded, lambda: image), ~left

    image, by_pillow = tf.cond(_starts_with(data, JPEG_START), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3]), by_pillow


def _decode_other(
    data: bytes, exif_orientation: np.bool_, max_pixels: np.int64
) -> tuple[np.ndarray, bytes]:
    """Decodes what is no JPEG.

    Returns:
      The image, without pixels where it is left to TensorFlow; and why it can't be decoded, else
      b"". (TensorFlow would log the traceback of an exception, for each bad image in each epoch.)
    """
    nothing = np.zeros([0, 0, 3], np.uint8)
    try:
        if is_left_to_tensorflow(data, max_pixels=int(max_pixels)):
            return nothing, b""
        image = decode_by_pillow(
            io.BytesIO(data), max_pixels=int(max_pixels), exif_orientation=bool(exif_orientation)
        )
    except Exception as error:  # decoders raise nearly anything, and memory may not suffice
        # ASCII, since Python must be able to decode TensorFlow's message.
        return nothing, ascii(f"{type(error).__name__}: {error}").encode()
    return (image, b"") if image.size else (nothing, b"no pixels")


# TensorFlow finds Python functions by a token, which tf.numpy_function numbers as it goes: another
# process that is sent a pipeline (`data/service.py`) would not find them. Under a name of its own,
# every process that imports this module has the function. The registry is not public, and holds
# functions weakly.
_OTHER = "beit_jax.data.decode._decode_other"
script_ops._py_funcs._funcs[_OTHER] = _decode_other


def _check_pixels(height: tf.Tensor, width: tf.Tensor, *, max_pixels: int) -> tf.Operation:
    """An operation that fails where an image has too many pixels; sides are int32 scalars."""
    message = f"more than {max_pixels} pixels:"
    return tf.debugging.Assert(_pixels(height, width) <= max_pixels, [message, width, "x", height])


def _pixels(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    return tf.cast(height, tf.int64) * tf.cast(width, tf.int64)


def decode_window(
    data: tf.Tensor, *, window: Window | None, exif_orientation: bool, max_pixels: int = MAX_PIXELS
) -> tf.Tensor:
    """Decodes a window of an image.

    For a JPEG that is stored upright only the window is decoded, at a half, a quarter or an eighth
    of the resolution where `Window.side` allows. Any other image is decoded whole and then cropped.

    Args:
      data: string scalar, the file's content.
      window: the part to decode; None for the whole image.
      exif_orientation, max_pixels: as for `decode_image`.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: as `decode_image` does.
    """
    return decode_element(
        data, window=window, exif_orientation=exif_orientation, max_pixels=max_pixels
    )["image"]


def decode_element(
    data: tf.Tensor, *, window: Window | None, exif_orientation: bool, max_pixels: int
) -> dict[str, tf.Tensor]:
    """What a source's `load` returns of an image file.

    Args:
      data, window, exif_orientation, max_pixels: as for `decode_window`.

    Returns:
      `image`, as `decode_window` returns it, and `by_pillow`, bool scalar: TensorFlow could not
      decode it, or not right.

    Raises:
      tf.errors.InvalidArgumentError: as `decode_image` does.
    """

    def whole() -> tuple[tf.Tensor, tf.Tensor]:
        image, by_pillow = _decode(data, exif_orientation=exif_orientation, max_pixels=max_pixels)
        return crop_to_window(image, window=window), by_pillow

    if window is None:
        image, by_pillow = whole()
        return {"image": image, "by_pillow": by_pillow}

    def part() -> tuple[tf.Tensor, tf.Tensor]:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
        box = window.box(height, width)
        shorter = tf.reduce_min(box[2:])

        def at(ratio: int) -> tf.Tensor:
            return tf.image.decode_and_crop_jpeg(
                data, box // ratio, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
            )

        halvings = sum(tf.cast(shorter >= ratio * window.side, tf.int32) for ratio in (2, 4, 8))
        with tf.control_dependencies([_check(data, height, width, max_pixels=max_pixels)]):
            halvings = tf.identity(halvings)
        image = tf.switch_case(halvings, [lambda r=ratio: at(r) for ratio in (1, 2, 4, 8)])
        return image, tf.constant(False)

    stored_upright = _starts_with(data, JPEG_START)
    if exif_orientation:
        stored_upright = tf.cond(stored_upright, lambda: orientation_of(data) == 1, lambda: False)
    image, by_pillow = tf.cond(stored_upright, part, whole)
    return {"image": tf.ensure_shape(image, [None, None, 3]), "by_pillow": by_pillow}


def _check(
    data: tf.Tensor, height: tf.Tensor, width: tf.Tensor, *, max_pixels: int
) -> tf.Operation:
    """An operation that fails for a JPEG that is too large, or ends too early.

    The decoder of a window stops below it, and would not notice that the rest is missing. A file
    that ends as a JPEG does is complete; with anything behind that end, only decoding tells (at an
    eighth of the resolution).

    Args:
      data: string scalar, the file's content.
      height, width: int32 scalars.
      max_pixels: as for `decode_image`.
    """

    def closer() -> tf.Tensor:
        with tf.control_dependencies([_check_pixels(height, width, max_pixels=max_pixels)]):
            return tf.size(tf.io.decode_jpeg(data, channels=3, ratio=8))

    ends = tf.strings.substr(data, -len(JPEG_END), len(JPEG_END)) == JPEG_END
    small = _pixels(height, width) <= max_pixels
    return tf.cond(ends & small, lambda: tf.constant(0), closer).op


def crop_to_window(image: tf.Tensor, *, window: Window | None) -> tf.Tensor:
    """Crops a decoded image, uint8 [h, w, 3], to the window; None keeps all of it."""
    if window is None:
        return image
    top, left, height, width = tf.unstack(window.box(*tf.unstack(tf.shape(image)[:2])))
    return image[top : top + height, left : left + width]


def _starts_with(data: tf.Tensor, start: bytes) -> tf.Tensor:
    return tf.strings.substr(data, 0, len(start)) == start


def _equal(values: tf.Tensor, text: bytes) -> tf.Tensor:
    return tf.reduce_all(values == tf.constant(list(text), values.dtype))


def _pad(data: tf.Tensor, length: int) -> tf.Tensor:
    """The first `length` bytes of the string, padded with zero bytes where it is shorter."""
    return tf.strings.substr(tf.strings.join([data, tf.constant(b"\0" * length)]), 0, length)


def _decode_webp(data: tf.Tensor) -> tf.Tensor:
    """Decodes a still WebP with the number of channels read from its header.

    With three channels TensorFlow 2.21 refuses transparency. With channels=0 ("as many as the file
    has") it corrupts the heap and the process dies, so the header is parsed here instead.
    """
    header = tf.io.decode_raw(_pad(tf.strings.substr(data, 0, 32), 32), tf.uint8)
    has_alpha = (_equal(header[12:16], b"VP8X") & (tf.cast(header[20], tf.int32) & 0x10 != 0)) | (
        _equal(header[12:16], b"VP8L") & (tf.cast(header[24], tf.int32) & 0x10 != 0)
    )
    return tf.cond(
        has_alpha,
        lambda: tf.io.decode_webp(data, channels=4)[0, ..., :3],  # [frame, h, w, channel]
        lambda: tf.io.decode_webp(data, channels=3)[0],
    )


def _turn_upright(image: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """Undoes the rotation and mirroring that a JPEG's EXIF block states."""
    orientation = orientation_of(data)

    def turn() -> tf.Tensor:
        turned = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)

        def mirror(image: tf.Tensor, axis: int, *orientations: int) -> tf.Tensor:
            wanted = tf.reduce_any(orientation == tf.constant(orientations))
            return tf.cond(wanted, lambda: tf.reverse(image, [axis]), lambda: image)

        return mirror(mirror(turned, 1, 2, 3, 6, 7), 0, 3, 4, 7, 8)

    return tf.cond(orientation > 1, turn, lambda: image)


def orientation_of(data: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of a JPEG.

    Args:
      data: string scalar, the file's content.

    Returns:
      int32 scalar in 1..8; 1 (upright) also where the tag is missing or invalid.
    """
    length = tf.strings.length(data)

    def segment(start: tf.Tensor) -> tf.Tensor:
        """The ten bytes of a segment's marker, length and kind; zeros past the end."""
        start = tf.minimum(start, length)
        return tf.io.decode_raw(_pad(tf.strings.substr(data, start, 10), 10), tf.uint8)

    def is_other_application(head: tf.Tensor) -> tf.Tensor:
        marker = (head[0] == 0xFF) & (head[1] >= 0xE0) & (head[1] <= 0xEF)
        return marker & ~is_exif(head)

    def is_exif(head: tf.Tensor) -> tf.Tensor:
        return (head[1] == 0xE1) & _equal(head[4:10], b"Exif\0\0")

    def size(head: tf.Tensor) -> tf.Tensor:
        head = tf.cast(head, tf.int32)
        return head[2] * 256 + head[3]

    def search() -> tf.Tensor:
        # Application segments come first in the file; most files have one or two of them.
        first = tf.constant(2)
        start, head = tf.while_loop(
            lambda start, head: is_other_application(head),
            lambda start, head: (start + 2 + size(head), segment(start + 2 + size(head))),
            [first, segment(first)],
            maximum_iterations=32,
        )

        def parse() -> tf.Tensor:
            block = tf.strings.substr(data, start + 10, tf.maximum(size(head) - 8, 0))
            return _tiff_orientation(tf.cast(tf.io.decode_raw(block, tf.uint8), tf.int32))

        return tf.cond(is_exif(head), parse, lambda: tf.constant(1))

    # Most files have a JFIF segment of sixteen bytes and no other: two comparisons spare the loop.
    begin = tf.io.decode_raw(_pad(tf.strings.substr(data, 2, 20), 20), tf.uint8)
    another = (begin[18] == 0xFF) & (begin[19] >= 0xE0) & (begin[19] <= 0xEF)
    jfif_alone = tf.reduce_all(begin[:4] == tf.constant([0xFF, 0xE0, 0, 16], tf.uint8)) & ~another
    return tf.cond(jfif_alone, lambda: tf.constant(1), search)


def _tiff_orientation(block: tf.Tensor) -> tf.Tensor:
    """The orientation tag of a TIFF block's first directory; `block` is int32 [bytes]."""
    length = tf.size(block)
    padded = tf.concat([block, tf.zeros([16], tf.int32)], 0)
    little = padded[0] == ord("I")

    def number(values: tf.Tensor, length: int) -> tf.Tensor:
        """Unsigned integers from bytes [..., length] in the block's byte order."""
        powers = tf.constant([256**exponent for exponent in range(length)])
        return tf.reduce_sum(values * tf.where(little, powers, powers[::-1]), -1)

    directory = number(padded[4:8], 4)
    directory = tf.where((directory >= 8) & (directory < length), directory, length)
    count = number(padded[directory : directory + 2], 2)
    count = tf.maximum(tf.minimum(count, (length - directory - 2) // 12), 0)
    entries = tf.reshape(padded[directory + 2 : directory + 2 + 12 * count], [-1, 12])
    is_orientation = number(entries[:, 0:2], 2) == 0x0112
    values = tf.boolean_mask(number(entries[:, 8:10], 2), is_orientation)
    orientation = tf.concat([values, [1]], 0)[0]
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, 1)
