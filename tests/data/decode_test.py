"""Every kind of file is decoded as Pillow decodes it; what can't be decoded is an error."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps, features

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


def needs(feature: str) -> pytest.MarkDecorator:
    """Skips a test where Pillow was built without a feature."""
    return pytest.mark.skipif(
        feature not in features.get_supported(), reason=f"Pillow without {feature}"
    )


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
        # What TensorFlow can't decode, or decodes wrong.
        ("BMP", PHOTO.convert("1"), {}, 0),
        ("PNG", PHOTO, {"save_all": True, "append_images": [PHOTO.rotate(180)]}, 0),
        ("WEBP", PHOTO, {"save_all": True, "append_images": [PHOTO.rotate(180)]}, 0),
        ("WEBP", WITH_ALPHA, {"save_all": True, "append_images": [WITH_ALPHA.rotate(180)]}, 0),
        ("TIFF", PHOTO, {}, 0),
        ("TIFF", PHOTO.convert("CMYK"), {"compression": "tiff_lzw"}, 0),
        ("PPM", PHOTO, {}, 0),
        ("ICO", PHOTO, {}, 0),
        ("MPO", PHOTO, {"save_all": True, "append_images": [PHOTO.rotate(180)]}, 0),
        pytest.param("AVIF", PHOTO, {}, 0, marks=needs("avif")),
        pytest.param("JPEG2000", PHOTO, {}, 0, marks=needs("jpg_2000")),
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


def _bmp(*, bits: int, compression: int, pixels: bytes, palette: bytes = b"") -> bytes:
    """A BMP of 4 x 2 pixels."""
    start = 14 + 40 + len(palette)
    info = (40, 4, 2, 1, bits, compression, len(pixels), 2835, 2835, len(palette) // 4, 0)
    header = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    return header + struct.pack("<IiiHHIIiiII", *info) + palette + pixels


GREYS = bytes(range(0, 256, 16))
PALETTE = b"".join(bytes([grey, 255 - grey, 7, 0]) for grey in GREYS)


@pytest.mark.parametrize(
    ("bits", "compression", "pixels", "palette"),
    [
        (4, 0, bytes([0x12, 0x34, 0, 0, 0x56, 0x78, 0, 0]), PALETTE),
        (8, 1, bytes([4, 3, 0, 0, 2, 5, 2, 9, 0, 1]), PALETTE),  # run-length encoded
        (16, 0, bytes(range(16)), b""),
        (16, 3, bytes(range(16)), struct.pack("<III", 0xF800, 0x07E0, 0x001F)),  # bit fields
        (32, 0, bytes(range(32)), b""),
    ],
)
def test_every_kind_of_bmp(bits, compression, pixels, palette):
    data = _bmp(bits=bits, compression=compression, pixels=pixels, palette=palette)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(_decode(data), expected)


def test_the_first_frame_of_a_gif_fills_its_canvas():
    """A frame smaller than its canvas, and transparent where it is there."""
    frame = PHOTO.resize((10, 6)).quantize(8)
    data = bytearray(_encode(frame, "GIF", transparency=3))
    data[6:10] = struct.pack("<HH", 20, 12)  # the canvas
    expected = np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
    assert expected.shape == (12, 20, 3)
    np.testing.assert_array_equal(_decode(bytes(data)), expected)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _with_late_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its pixels, where ExifTool puts EXIF data."""
    body = kind + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:-12] + chunk + data[-12:]


TURNED = {
    "PNG": _encode(PHOTO, "PNG", exif=_exif(6)),
    "WebP": _encode(PHOTO, "WEBP", exif=_exif(5)),
    "TIFF": _encode(PHOTO, "TIFF", exif=_exif(8)),
    "XMP in WebP": _encode(PHOTO, "WEBP", xmp=XMP),
    "EXIF at the end of a PNG": _with_late_chunk(
        _encode(PHOTO, "PNG"), b"eXIf", _exif(7).tobytes()[6:]
    ),
    "XMP in a PNG": _with_late_chunk(
        _encode(PHOTO, "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_any_format_is_turned_upright(name):
    stored = Image.open(io.BytesIO(TURNED[name]))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    assert upright.shape == (80, 60, 3)
    np.testing.assert_array_equal(_decode(TURNED[name]), upright)
    # (Pillow turns a TIFF while it loads it, as the TIFF's own orientation says.)
    expected = np.asarray(Image.open(io.BytesIO(TURNED[name])))
    np.testing.assert_array_equal(_decode(TURNED[name], exif_orientation=False), expected)


def test_only_what_needs_it_is_decoded_by_pillow():
    def by_pillow(data: bytes) -> bool:
        made = decode.decode_element(
            tf.constant(data), window=None, exif_orientation=True, max_pixels=10**6
        )
        return bool(made["by_pillow"])

    fast = [("JPEG", PHOTO), ("PNG", PHOTO), ("PNG", WITH_ALPHA), ("WEBP", PHOTO)]
    for kind, image in [*fast, ("WEBP", WITH_ALPHA), ("PNG", PHOTO.quantize(9))]:
        assert not by_pillow(_encode(image, kind))
    assert not by_pillow(_with_late_chunk(_encode(PHOTO, "PNG"), b"tEXt", b"Title\0A photograph"))
    assert all(by_pillow(data) for data in TURNED.values())
    assert by_pillow(_encode(PHOTO, "BMP"))
    assert by_pillow(_encode(PHOTO.quantize(9), "GIF"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("PNG", {"exif": _exif(6)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": _exif(6)}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
    ],
)
def test_too_many_pixels_are_refused(kind, options):
    data = _encode(PHOTO.quantize(9) if kind == "GIF" else PHOTO, kind, **options)  # 60 x 80
    whole = decode.decode_image(tf.constant(data), exif_orientation=True, max_pixels=4800)
    assert whole.shape[0] * whole.shape[1] == 4800
    with pytest.raises(tf.errors.InvalidArgumentError, match="than 4799"):
        decode.decode_image(tf.constant(data), exif_orientation=True, max_pixels=4799)
    window = decode.Window(box=lambda height, width: tf.constant([0, 0, 4, 4]), side=4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="than 4799"):
        decode.decode_window(
            tf.constant(data), window=window, exif_orientation=True, max_pixels=4799
        )


def _lying_about_its_size(kind: str, width: int, height: int) -> bytes:
    """A small image whose header claims another size."""
    data = bytearray(_encode(PHOTO.convert("L") if kind == "JPEG" else PHOTO, kind))
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    if kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_size_that_a_header_claims_takes_no_memory(kind):
    """Twelve gigabytes of pixels, were they allocated."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"more than 89478485|exceeds limit"):
        _decode(_lying_about_its_size(kind, 65000, 65000))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("trailer", [b"", b"\0" * 9, b"\xff\xd9"])
def test_a_window_of_a_jpeg_is_refused_where_the_whole_is(progressive, trailer):
    data = _encode(PHOTO, "JPEG", progressive=progressive)
    window = decode.Window(box=lambda height, width: tf.constant([0, 0, 8, 8]), side=8)
    decoders = [
        tf.function(lambda data: decode.decode_image(data, exif_orientation=True)),
        tf.function(lambda data: decode.decode_window(data, window=window, exif_orientation=True)),
    ]

    def works(decoder, data: bytes) -> bool:
        try:
            decoder(tf.constant(data))
        except tf.errors.InvalidArgumentError:
            return False
        return True

    # With the last trailer, what is cut off in the middle ends as a JPEG does. It is too short, and
    # yet libjpeg may read it and fill the rest with grey.
    decisions = []
    for cut in (0, 1, 2, 3, 50, 300, len(data) // 2):
        cut_off = data[: len(data) - cut] + trailer
        whole, part = (works(decoder, cut_off) for decoder in decoders)
        assert whole == part
        decisions.append(whole)
    assert decisions[0]
    assert not all(decisions)


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
        _encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)])[:300],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",  # runs Ghostscript
        _encode(PHOTO, "TGA"),  # has no header to know it by
        _lying_about_its_size("BMP", 5, -(2**31)),
        _lying_about_its_size("JPEG", 0, 0),
        _lying_about_its_size("PNG", 0, 0),
    ],
)
def test_what_cannot_be_decoded_is_an_error(data):
    with pytest.raises(tf.errors.InvalidArgumentError):
        _decode(data)
