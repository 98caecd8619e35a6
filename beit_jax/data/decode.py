"""From the bytes of an image file to pixels, or to just the window of pixels that is needed.

    image = decode_image(data, exif_orientation=True)  # uint8 [h, w, 3]
    crop = decode_window(data, window=Window(box=box, side=224), exif_orientation=True)

TensorFlow decodes JPEG, PNG, BMP, GIF and WebP; this module adds what its decoders lack: EXIF
orientation, palettes of BMP files, a safe call for WebP, and decoding only a window of a JPEG at
the resolution that the view needs. Everything here runs inside a tf.data graph.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from beit_jax.data.tracing import traced_once

# What `decode_image` can read, by the extensions that such files usually have.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

JPEG_START = b"\xff\xd8\xff"


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


@traced_once
def decode_image(data: tf.Tensor, *, exif_orientation: bool) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP, GIF (first frame) or WebP as Pillow's convert("RGB") does.

    The format is recognised by the content, not by the file's name. Alpha is dropped; 16-bit
    channels keep their high 8 bits (Pillow clips grey ones instead). JPEG uses the accurate inverse
    DCT, which equals Pillow's bit for bit.

    Args:
      data: string scalar, the file's content.
      exif_orientation: turn JPEGs upright as PIL.ImageOps.exif_transpose does. (The official loader
        does not.)

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: the data is incomplete or in no such format. TensorFlow
        does not support animated WebP or BMP with fewer than 8 bits per pixel; these raise it too.
    """

    def jpeg() -> tf.Tensor:
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return _turn_upright(image, data) if exif_orientation else image

    def other() -> tf.Tensor:
        header = tf.io.decode_raw(_pad(tf.strings.substr(data, 0, 32), 32), tf.uint8)
        start, kind = header[:4], header[8:16]
        is_webp = _equal(start, b"RIFF") & _equal(kind[:4], b"WEBP")
        is_palette_bmp = _equal(start[:2], b"BM") & (header[28] == 8) & (header[29] == 0)
        return tf.case(
            [
                (is_webp, lambda: _decode_webp(data, header)),
                (is_palette_bmp, lambda: _decode_palette_bmp(data)),
            ],
            default=lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
            exclusive=True,
        )

    image = tf.cond(_starts_with(data, JPEG_START), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3])


def decode_window(data: tf.Tensor, *, window: Window | None, exif_orientation: bool) -> tf.Tensor:
    """Decodes a window of an image.

    For a JPEG that is stored upright only the window is decoded, at a half, a quarter or an eighth
    of the resolution where `Window.side` allows. Any other image is decoded whole and then cropped.

    Args:
      data: string scalar, the file's content.
      window: the part to decode; None for the whole image.
      exif_orientation: as for `decode_image`.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.InvalidArgumentError: as `decode_image` does.
    """
    if window is None:
        return decode_image(data, exif_orientation=exif_orientation)

    def whole() -> tf.Tensor:
        return crop_to_window(decode_image(data, exif_orientation=exif_orientation), window=window)

    def part() -> tf.Tensor:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
        box = window.box(height, width)
        shorter = tf.reduce_min(box[2:])

        def at(ratio: int) -> tf.Tensor:
            return tf.image.decode_and_crop_jpeg(
                data, box // ratio, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
            )

        halvings = sum(tf.cast(shorter >= ratio * window.side, tf.int32) for ratio in (2, 4, 8))
        return tf.switch_case(halvings, [lambda r=ratio: at(r) for ratio in (1, 2, 4, 8)])

    stored_upright = _starts_with(data, JPEG_START)
    if exif_orientation:
        stored_upright = tf.cond(stored_upright, lambda: orientation_of(data) == 1, lambda: False)
    return tf.ensure_shape(tf.cond(stored_upright, part, whole), [None, None, 3])


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


def _decode_webp(data: tf.Tensor, header: tf.Tensor) -> tf.Tensor:
    """Decodes a WebP with the number of channels read from its header.

    With three channels TensorFlow 2.21 refuses an animation. With channels=0 ("as many as the file
    has") it corrupts the heap and the process dies, so the header is parsed here instead.
    """
    flags = tf.cast(header[20], tf.int32)
    extended = _equal(header[12:16], b"VP8X")
    animated = extended & (flags & 0x02 != 0)
    has_alpha = (extended & (flags & 0x10 != 0)) | (
        _equal(header[12:16], b"VP8L") & (tf.cast(header[24], tf.int32) & 0x10 != 0)
    )
    return tf.cond(
        has_alpha & ~animated,
        lambda: tf.io.decode_webp(data, channels=4)[0, ..., :3],  # [frame, h, w, channel]
        lambda: tf.io.decode_webp(data, channels=3)[0],
    )


def _decode_palette_bmp(data: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP of 8 bits per pixel, for which TensorFlow returns indices into the palette."""
    indices = tf.io.decode_bmp(data)[..., 0]
    info_size = tf.io.decode_raw(tf.strings.substr(data, 14, 4), tf.int32)[0]
    pixels_start = tf.io.decode_raw(tf.strings.substr(data, 10, 4), tf.int32)[0]
    size = tf.minimum((pixels_start - 14 - info_size) // 4 * 4, 1024)
    palette = tf.io.decode_raw(_pad(tf.strings.substr(data, 14 + info_size, size), 1024), tf.uint8)
    palette = tf.reshape(palette, [256, 4])[:, 2::-1]  # stored as blue, green, red, unused
    return tf.gather(palette, tf.cast(indices, tf.int32))


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
