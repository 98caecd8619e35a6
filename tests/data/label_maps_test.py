"""Labels are the numbers that a PNG stores, classes are what the settings make of them."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.config import ConfigError, SegmentDataConfig
from beit_jax.data import label_maps, sources
from beit_jax.data.label_png import LabelMapError, read_labels

MAX_PIXELS = 10_000
CONFIG = SegmentDataConfig(source="embedded")


def _png(rows: np.ndarray, *, depth: int, colours: int, palette: bytes = b"") -> bytes:
    """A PNG of samples [h, w * channels] that were packed into bytes by no library."""
    bits = np.unpackbits(rows.astype(">u2").view(np.uint8).reshape(*rows.shape, 2), axis=-1)
    packed = np.packbits(bits[..., 16 - depth :].reshape(len(rows), -1), axis=-1)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">II", rows.shape[1] // channels, len(rows))
    content = b"".join(b"\0" + row.tobytes() for row in packed)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + bytes([depth, colours, 0, 0, 0]))
        + (chunk(b"PLTE", palette) if palette else b"")
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


def _decode(data: bytes) -> np.ndarray:
    return label_maps.decode_labels(tf.constant(data), max_pixels=MAX_PIXELS).numpy()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("colours", [0, 3], ids=["grey", "palette"])
def test_labels_are_the_numbers_that_are_stored(depth, colours):
    """TensorFlow and Pillow alone would stretch grey of few bits, and look palettes up."""
    labels = np.random.default_rng(depth).integers(0, 2**depth, (13, 7))
    palette = bytes(np.random.default_rng(0).integers(0, 256, 3 << depth).tolist())
    data = _png(labels, depth=depth, colours=colours, palette=palette if colours == 3 else b"")
    np.testing.assert_array_equal(_decode(data), labels)
    np.testing.assert_array_equal(read_labels(data, max_pixels=MAX_PIXELS), labels)


def test_pillows_palettes_and_transparent_palettes_are_read():
    labels = np.random.default_rng(0).integers(0, 20, (9, 30)).astype(np.uint8)
    image = Image.fromarray(labels).convert("L")
    image.putpalette([3, 1, 4] * 256)
    for more in ({}, {"transparency": 0}, {"optimize": True}, {"bits": 8}):
        file = io.BytesIO()
        image.save(file, "PNG", **more)
        np.testing.assert_array_equal(_decode(file.getvalue()), labels)


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return file.getvalue()


REFUSED = {
    "is no PNG": _jpeg(),
    "has RGB colours, not one label": _png(np.zeros((4, 12)), depth=8, colours=2),
    "has RGB colours with transparency": _png(np.zeros((4, 16)), depth=8, colours=6),
    "has grey with transparency": _png(np.zeros((4, 8)), depth=8, colours=4),
    "has 16 bits": _png(np.zeros((4, 4)), depth=16, colours=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_map_of_labels_is_refused(message):
    with pytest.raises(LabelMapError, match=message):
        read_labels(REFUSED[message], max_pixels=MAX_PIXELS)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"label map: {message}"):
        _decode(REFUSED[message])


@pytest.mark.parametrize("colours", [0, 3], ids=["grey", "palette"])
def test_a_damaged_or_too_large_map_fails(colours):
    palette = b"\1\2\3" * 256 if colours else b""
    labels = np.random.default_rng(0).integers(0, 256, (50, 50))
    data = _png(labels, depth=8, colours=colours, palette=palette)
    with pytest.raises(tf.errors.InvalidArgumentError):
        _decode(data[: len(data) // 2])
    large = _png(np.zeros((1, MAX_PIXELS + 1)), depth=8, colours=colours, palette=palette)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 10000"):
        _decode(large)
    # A header may claim any size.
    claim = large[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + large[24:]
    with pytest.raises(tf.errors.InvalidArgumentError):
        _decode(claim)


# ---------------------------------------------------------------------------- classes


def _to_classes(labels: np.ndarray, **settings) -> np.ndarray:
    config = SegmentDataConfig(source="embedded", **settings)
    return label_maps.to_classes(tf.constant(labels, tf.uint8), config=config).numpy()


def test_labels_become_classes():
    every = np.arange(256).astype(np.uint8)
    np.testing.assert_array_equal(_to_classes(every), every)
    np.testing.assert_array_equal(_to_classes(every, ignore_label=None), every)
    np.testing.assert_array_equal(
        _to_classes(every, ignore_label=11), np.where(every == 11, 255, every)
    )
    # mmseg's reduce_zero_label, in its own three steps.
    official = every.copy()
    official[official == 0] = 255
    official = official - 1
    official[official == 254] = 255
    np.testing.assert_array_equal(_to_classes(every, zero_is_background=True), official)


def _wrong(labels: list[int], *, classes: int, **settings) -> int:
    config = SegmentDataConfig(source="embedded", **settings)
    found = label_maps._largest(tf.constant([labels], tf.uint8), config=config, classes=classes)
    return int(found)


def test_a_label_that_is_no_class_is_found():
    assert _wrong([0, 10, 255], classes=11) == -1
    assert _wrong([0, 11, 255], classes=11) == 11
    assert _wrong([0, 11], classes=11, ignore_label=11) == -1
    assert _wrong([0, 11, 255], classes=11, ignore_label=11) == 255
    assert _wrong([0, 255], classes=255, ignore_label=None) == 255
    assert _wrong([0, 150, 255], classes=150, zero_is_background=True) == -1
    assert _wrong([0, 151], classes=150, zero_is_background=True) == 151


# ---------------------------------------------------------------------------- before a run


def _source(*maps: np.ndarray | bytes, size: tuple[int, int] | None = None) -> sources.Source:
    """Maps with images of their own size, or of another one."""

    def load(index: tf.Tensor, *, window=None) -> dict:
        data = maps[int(index)]
        if isinstance(data, bytes):
            labels = label_maps.decode_labels(data, max_pixels=MAX_PIXELS)
        else:
            labels = tf.constant(data, tf.uint8)
        return {"segmentation": labels, "image": tf.zeros([*(size or labels.shape), 3], tf.uint8)}

    return sources.Source(
        size=len(maps), name=lambda index: f"{index}\n.png", load=load, fields=("segmentation",)
    )


def test_a_label_without_a_class_is_refused_before_a_run():
    good, bad = np.array([[0, 10, 255]]), np.array([[0, 17, 255]])
    label_maps.check_labels(_source(good, good), config=CONFIG, classes=11)
    with pytest.raises(ConfigError, match=re.escape(r"label 17 in the map of 1\n.png")) as error:
        label_maps.check_labels(_source(good, bad), config=CONFIG, classes=11, setting="mine")
    assert str(error.value).startswith("mine: ")
    assert "there are 11 classes" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_map_is_refused_before_a_run():
    colours = REFUSED["has RGB colours, not one label"]
    with pytest.raises(
        ConfigError, match=r"the map of 0\\n\.png has RGB colours, not one"
    ) as error:
        label_maps.check_labels(_source(colours), config=CONFIG, classes=11)
    assert "\n" not in str(error.value)
    # Damage is left to the run, which replaces the image.
    grey = _png(np.random.default_rng(0).integers(0, 256, (50, 50)), depth=8, colours=0)
    label_maps.check_labels(_source(grey[:200]), config=CONFIG, classes=11)


def test_maps_that_say_nothing_are_refused_or_named_before_a_run(caplog):
    """0 and 255 may be meant as two classes, of which one is ignored."""
    alone, ignored = np.array([[0, 255]]), np.array([[255, 255]])
    with pytest.raises(ConfigError, match="no pixel of 2 maps has a class"):
        label_maps.check_labels(_source(ignored, ignored), config=CONFIG, classes=2)
    with caplog.at_level("WARNING"):
        label_maps.check_labels(_source(alone, np.array([[0, 1]])), config=CONFIG, classes=2)
        label_maps.check_labels(_source(alone, ignored), config=CONFIG, classes=1)
        assert not caplog.records
        label_maps.check_labels(_source(alone, ignored), config=CONFIG, classes=2)
        label_maps.check_labels(_source(alone, size=(3, 4)), config=CONFIG, classes=2)
    first, second = (record.getMessage() for record in caplog.records)
    assert "all pixels of 2 maps have label 0 or are ignored, but there are 2 classes" in first
    assert r"the map of 0\n.png is 1 × 2, its image 3 × 4; such images are replaced" in second


def test_only_a_sample_is_read_before_a_run():
    """Evenly spaced, the first and the last among them."""
    read = []

    def load(index: tf.Tensor, *, window=None) -> dict:
        read.append(int(index))
        return {name: tf.zeros([2, 2], tf.uint8) for name in ("image", "segmentation")}

    source = sources.Source(size=1000, name=str, load=load, fields=("segmentation",))
    label_maps.check_labels(source, config=CONFIG, classes=1)
    assert len(read) == label_maps.SAMPLE
    assert read[0] == 0
    assert read[-1] == 999
