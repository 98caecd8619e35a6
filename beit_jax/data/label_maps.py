"""Label maps: from a PNG's bytes to labels, and from labels to classes with 255 for "ignored".

    labels = decode_labels(data, max_pixels=MAX_PIXELS)  # uint8 [h, w], as they are stored
    loaded = with_classes(loaded, config=config, classes=150)  # inside the guard of a bad image
    check_labels(source, config=config, classes=150)  # before a run starts

A map that does not fit its image, and one with a label that is no class, make a bad image: such an
image is replaced, counted and named like one that can't be decoded (mmseg would train on whatever
lies beyond the logits, or end). A data set all of whose maps are wrong ends before anything is
compiled, by `check_labels`.
"""

import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.ops import script_ops

from beit_jax.config import ConfigError, check
from beit_jax.config.segment import IGNORE, SegmentDataConfig
from beit_jax.data.by_pillow import TooLargeError
from beit_jax.data.label_png import (
    COLOURS_AT,
    DEPTH_AT,
    GREY,
    PNG_START,
    LabelMapError,
    read_labels,
)
from beit_jax.data.sources.source import Element, Source
from beit_jax.data.tracing import traced_once
from beit_jax.files import printable

SAMPLE = 20  # maps that are looked at before a run starts
_MARK = "label map: "  # how the messages start that say what is wrong with a map
_WRONG_SIZE = _MARK + "of another size than its image"


@traced_once
def decode_labels(data: tf.Tensor, *, max_pixels: int) -> tf.Tensor:
    """Decodes a PNG of labels, in a tf.data graph.

    8-bit grey stays in TensorFlow, everything else goes through Pillow.

    Args:
      data: string scalar, the file's content.
      max_pixels: height times width may not exceed it; compared before anything is decoded.

    Returns:
      uint8 [h, w], the labels as they are stored; see `label_png.read_labels`.

    Raises:
      tf.errors.InvalidArgumentError: the file is damaged, too large, or no map of labels.
    """
    padded = tf.strings.join([data, tf.constant(b"\0" * 32)])
    head = tf.io.decode_raw(tf.strings.substr(padded, 0, 32), tf.uint8)
    is_png = tf.reduce_all(head[: len(PNG_START)] == tf.constant(list(PNG_START), tf.uint8))
    grey = is_png & (head[DEPTH_AT] == 8) & (head[COLOURS_AT] == GREY)

    def plain() -> tf.Tensor:
        powers = tf.constant([1 << 24, 1 << 16, 1 << 8, 1], tf.int64)
        sides = tf.reduce_sum(tf.cast(tf.reshape(head[16:24], [2, 4]), tf.int64) * powers, 1)
        # (Compared as a quotient: the product of two sides that a file only claims may overflow.)
        small = sides[1] <= max_pixels // tf.maximum(sides[0], 1)
        message = f"more than {max_pixels} pixels:"
        with tf.control_dependencies([tf.debugging.Assert(small, [message, sides])]):
            return tf.io.decode_png(data, channels=1)[..., 0]

    def by_pillow() -> tf.Tensor:
        made = tf.raw_ops.PyFuncStateless(
            input=[data, tf.constant(max_pixels, tf.int64)],
            token=_READ,
            Tout=[tf.uint8, tf.string],
        )
        with tf.control_dependencies([tf.debugging.Assert(made[1] == b"", [made[1]])]):
            return tf.ensure_shape(made[0], [None, None])

    return tf.ensure_shape(tf.cond(grey, plain, by_pillow), [None, None])


def _read(data: bytes, max_pixels: np.int64) -> tuple[np.ndarray, bytes]:
    """The labels, and why there are none, else b""; as `decode._decode_other` does it, and why."""
    try:
        return read_labels(data, max_pixels=int(max_pixels)), b""
    except (LabelMapError, TooLargeError) as error:
        reason = f"{_MARK}{error}"
    except Exception as error:  # decoders raise nearly anything, and memory may not suffice
        reason = ascii(f"{type(error).__name__}: {error}")
    return np.zeros([0, 0], np.uint8), reason.encode()


# Under a name of its own, for the same reason as in `decode.py`.
_READ = "beit_jax.data.label_maps._read"
script_ops._py_funcs._funcs[_READ] = _read


def to_classes(labels: tf.Tensor, *, config: SegmentDataConfig) -> tf.Tensor:
    """From labels as they are stored to classes.

    Args:
      labels: uint8 of any shape.
      config: which label is ignored, and whether 0 is no class. With both at ADE20K's values this
        is mmseg's `reduce_zero_label`: 0 and 255 become 255, everything else one less.

    Returns:
      uint8 of the same shape: a class, or 255 where the pixel is ignored. A label of 255 that is
      not to be ignored can't be told from that, see `_largest`.
    """
    classes = labels - 1 if config.zero_is_background else labels  # 0 - 1 is 255
    if config.ignore_label is None:
        return classes
    ignored = labels == tf.constant(config.ignore_label, tf.uint8)
    return tf.where(ignored, tf.constant(IGNORE, tf.uint8), classes)


def _largest(labels: tf.Tensor, *, config: SegmentDataConfig, classes: int) -> tf.Tensor:
    """The largest label that is no class, int32 scalar; -1 where all are classes or ignored."""
    table = np.arange(256)
    numbers = table - 1 if config.zero_is_background else table
    wrong = numbers >= classes
    if config.ignore_label is not None:
        wrong[config.ignore_label] = False
    # Nearly always the numbers that are no classes are the largest ones, and the largest label of
    # a map tells; the exception is an ignored label among them.
    largest = tf.cast(tf.reduce_max(labels), tf.int32)

    def searched() -> tf.Tensor:
        counts = tf.math.bincount(
            tf.reshape(tf.cast(labels, tf.int32), [-1]), minlength=256, maxlength=256
        )
        found = (counts > 0) & tf.constant(wrong)
        return tf.reduce_max(tf.where(found, tf.range(256), -1))

    first_wrong = int(np.flatnonzero(wrong)[0]) if wrong.any() else 256
    return tf.cond(largest < first_wrong, lambda: tf.constant(-1), searched)


def with_classes(loaded: Element, *, config: SegmentDataConfig, classes: int) -> Element:
    """What a source loaded, with classes instead of labels, if the map can be used.

    Args:
      loaded: with `image`, uint8 [h, w, 3], and `segmentation`, uint8 [h, w], labels.
      config: which labels are ignored.
      classes: the number of classes.

    Returns:
      `loaded` with `segmentation` as `to_classes` returns it.

    Raises:
      tf.errors.InvalidArgumentError: a label is no class, or the sizes differ (EXIF orientation
        turns the image alone).
    """
    labels = loaded["segmentation"]
    same = tf.reduce_all(tf.shape(labels) == tf.shape(loaded["image"])[:2])
    largest = _largest(labels, config=config, classes=classes)
    checks = [
        tf.debugging.Assert(same, [_WRONG_SIZE, tf.shape(labels), tf.shape(loaded["image"])[:2]]),
        tf.debugging.Assert(
            largest < 0, [f"{_MARK}there are {classes} classes, but label", largest]
        ),
    ]
    with tf.control_dependencies(checks):
        return {**loaded, "segmentation": to_classes(labels, config=config)}


def check_labels(
    source: Source, *, config: SegmentDataConfig, classes: int, setting: str = "config.data.source"
) -> None:
    """Looks at a few maps before a run starts, evenly spaced over the source.

    Images that can't be decoded, and maps of another size than their image, are left to the run,
    which replaces and counts them; a map of another size is named in a warning. So is a single
    class, of several, that all of these maps have: 255 may be meant as a class.

    Args:
      source: images with `segmentation`.
      config: which labels are ignored.
      classes: the number of classes.
      setting: the setting that names the source, for error messages.

    Raises:
      ConfigError: a map has a label that is no class, a file is no map of labels, or no pixel of
        all these maps has a class.
    """
    found: set[int] = set()  # labels that are not ignored
    maps = 0
    for index, request in sample(source, count=SAMPLE):
        try:
            loaded = source.load(request)
            labels = loaded["segmentation"]
        except tf.errors.OpError as error:
            said = re.search(f'{_MARK}([^"\\n\\]]*)', str(error.message))
            if said and " pixels are more than " not in said[1]:
                raise ConfigError(
                    f"{setting}: the map of {printable(source.name(index))}"
                    f" {said[1].strip()}; a map is a PNG with 8 bits, grey or with a palette"
                ) from None
            continue
        except UnicodeDecodeError:  # of a message that quotes what is not UTF-8
            continue
        name = printable(source.name(index))
        sizes = [tuple(part.shape[:2]) for part in (labels, loaded["image"])]
        if sizes[0] != sizes[1]:
            logging.warning(
                "%s: the map of %s is %d × %d, its image %d × %d; such images are replaced",
                *(setting, name, *sizes[0], *sizes[1]),
            )
            continue
        maps += 1
        numbers = np.unique(labels.numpy())
        classed = to_classes(tf.constant(numbers), config=config).numpy()
        found.update(numbers[classed != IGNORE].tolist())
        largest = int(_largest(labels, config=config, classes=classes))
        if largest >= 0:
            first = ", of which label 1 is the first" if config.zero_is_background else ""
            raise ConfigError(
                f"{setting}: label {largest} in the map of {name}, but there are {classes}"
                f" classes{first} (config.data.ignore_label is {config.ignore_label})"
            )
    _check_found(found, maps=maps, config=config, classes=classes, setting=setting)


def _check_found(
    found: set[int], *, maps: int, config: SegmentDataConfig, classes: int, setting: str
) -> None:
    """Refuses labels that are all ignored, and warns of a single class; see `check_labels`."""
    ignored = f"config.data.ignore_label is {config.ignore_label}"
    check(bool(found) or not maps, setting, f"no pixel of {maps} maps has a class; {ignored}")
    if len(found) == 1 and classes > 1:
        logging.warning(
            "%s: all pixels of %d maps have label %d or are ignored, but there are %d classes; %s",
            *(setting, maps, *found, classes, ignored),
        )


def sample(source: Source, *, count: int) -> Iterator[tuple[int, tf.Tensor | Element]]:
    """Up to `count` images, evenly spaced or the first: their index, and what `load` takes."""
    if source.sequence is not None:
        records = source.sequence(seed=None, epoch=0, shard=0, shards=1).take(count)
        yield from ((int(record["index"]), record) for record in records)
        return
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        yield index, tf.constant(index, tf.int64)
