"""Every kind of file is decoded as Pillow decodes it; what can't be decoded is an error."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from beit_jax.data import decode


def _photo(height: int = 60, width: int = 80) -> Image.Image:
    """A smooth picture that looks different in every orientation."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / width, 255 * y / height
    blue = 127 + 120 * np.sin(x / 9) * np.cos(y / 7)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def _decode(data: bytes, exif_orientation: bool = True) -> np.ndarray:
    # Through tf.function: as in the tf.data graph.
    in_graph = tf.function(
        lambda data: decode.decode_image(data, exif_orientation=exif_orientation)
    )
    return in_graph(tf.constant(data)).numpy()


PHOTO = _photo()
WITH_ALPHA = _photo().convert("RGBA")
WITH_ALPHA.putalpha(Image.fromarray((np.mgrid[:60, :80][1] * 3).astype(np.uint8)))


@pytest.mark.parametrize(
    ("kind", "image", "options", "tolerance"),
    [
        ("JPEG", PHOTO, {}, 0),
        ("JPEG", PHOTO.convert("L"), {}, 0),
        ("JPEG", PHOTO.convert("CMYK"), {"quality": 95}, 2),  # rounding of the conversion
        ("JPEG", PHOTO, {"progressive": True}, 0),
        ("JPEG", PHOTO, {"subsampling": 2, "quality": 60}, 0),
        ("JPEG", PHOTO.resize((1, 1)), {}, 0),
        ("JPEG", PHOTO.resize((3, 70)), {}, 0),
        ("PNG", PHOTO, {}, 0),
        ("PNG", PHOTO.quantize(16), {}, 0),
        ("PNG", PHOTO.quantize(16), {"transparency": 0}, 0),
        ("PNG", PHOTO.convert("L"), {}, 0),
        ("PNG", PHOTO.convert("LA"), {}, 0),
        ("PNG", PHOTO.convert("1"), {}, 0),
        ("PNG", WITH_ALPHA, {}, 0),
        ("PNG", PHOTO.resize((1, 1)), {}, 0),
        ("BMP", PHOTO, {}, 0),
        ("BMP", PHOTO.convert("L"), {}, 0),
        ("BMP", PHOTO.quantize(16), {}, 0),
        ("BMP", PHOTO.quantize(200), {}, 0),
        ("BMP", WITH_ALPHA, {}, 0),
        ("GIF", PHOTO.quantize(32), {}, 0),
        ("GIF", PHOTO.quantize(32), {"save_all": True, "append_images": [PHOTO.rotate(180)]}, 0),
        ("WEBP", PHOTO, {}, 0),
        ("WEBP", PHOTO, {"lossless": True}, 0),
        ("WEBP", WITH_ALPHA, {}, 0),
        ("WEBP", WITH_ALPHA, {"lossless": True, "exact": True}, 0),
    ],
)
def test_decodes_what_pillow_decodes(kind, image, options, tolerance):
    data = _encode(image, kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(_decode(data).astype(int) - expected).max() <= tolerance


def test_of_16_bits_the_high_8_stay():
    values = (np.mgrid[:60, :80][1] * 800).astype(np.uint16)
    decoded = _decode(_encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat((values >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x010F] = "A camera maker"  # before the orientation in the directory
    exif[0x0112] = orientation
    exif[0x0132] = "2021:06:15 08:25:04"
    data = _encode(PHOTO, "JPEG", exif=exif)
    stored = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(_decode(data), np.asarray(ImageOps.exif_transpose(stored)))
    np.testing.assert_array_equal(_decode(data, exif_orientation=False), np.asarray(stored))


def _exif_segment(block: bytes) -> bytes:
    return b"\xff\xe1" + (len(block) + 8).to_bytes(2, "big") + b"Exif\0\0" + block


def _little(orientation: int) -> bytes:
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00" + orientation.to_bytes(2, "little") + b"\0\0"
    return b"II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (b"", 1),
        (_exif_segment(_little(6)), 6),
        (b"\xff\xe1\x00\x06http" + _exif_segment(_little(8)), 8),  # XMP before EXIF
        (b"\xff\xec\x00\x02" + _exif_segment(_little(3)), 3),  # an empty segment before it
        (_exif_segment(_little(9)), 1),
        (_exif_segment(_little(0)), 1),
        (_exif_segment(b""), 1),
        (_exif_segment(b"II*\0"), 1),
        (_exif_segment(b"II*\0\xff\xff\xff\xff"), 1),  # the directory lies outside
        (_exif_segment(b"II*\0\x08\0\0\0\xff\xff"), 1),  # 65535 entries, none there
        (_exif_segment(_little(6)[:14]), 1),
        (b"\xff\xe1\xff\xff", 1),  # a segment longer than the file
    ],
)
def test_exif_is_found_or_does_no_harm(segments, expected):
    data = _encode(PHOTO, "JPEG")
    data = data[:2] + segments + (data[2:] if segments[2:4] != b"\xff\xff" else b"")
    assert tf.function(decode.orientation_of)(tf.constant(data)).numpy() == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"B",
        b"no image at all" * 20,
        _encode(PHOTO, "JPEG")[:-300],
        _encode(PHOTO, "PNG")[:200],
        _encode(PHOTO, "WEBP")[:100],
        _encode(PHOTO.quantize(200), "BMP")[:500],
        # TensorFlow 2.21 dies of a corrupt heap when it decodes an animated WebP.
        _encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]),
        _encode(WITH_ALPHA, "WEBP", save_all=True, append_images=[WITH_ALPHA.rotate(90)]),
    ],
)
def test_what_cannot_be_decoded_is_an_error(data):
    with pytest.raises(tf.errors.InvalidArgumentError):
        _decode(data)
