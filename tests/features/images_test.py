"""Image files are found by name or header, read upright, and made square as evaluation does."""

import os
import threading

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import by_pillow
from beit_jax.features import images


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, different in every corner."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width]
    ramps = np.stack([row * 255 / height, column * 255 / width, (row + column) % 256], axis=-1)
    pixels = ramps + rng.normal(size=(height, width, 3)) * 8
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def test_images_are_found_by_suffix_or_header_at_any_depth(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    picture(8, 8).save(tmp_path / "b" / "deep" / "1.PNG")
    picture(8, 8).save(tmp_path / "a.jpeg")
    picture(8, 8).save(tmp_path / ".hidden" / "no.png")
    picture(8, 8).save(tmp_path / ".no.png")
    for format in ("JPEG", "PNG", "GIF", "WEBP"):
        picture(8, 8).save(tmp_path / "b" / format, format=format)
    (tmp_path / "notes.txt").write_text("RIFF but no picture")
    (tmp_path / "broken.webp").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = images.find_images(str(tmp_path))
    assert found.names == [
        "a.jpeg",
        "b/GIF",
        "b/JPEG",
        "b/PNG",
        "b/WEBP",
        "b/deep/1.PNG",
        "broken.webp",
    ]
    assert found.others == 2


def test_what_is_no_regular_file_is_no_image_whatever_its_name(tmp_path):
    picture(8, 8).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    found = images.find_images(str(tmp_path))
    assert (found.names, found.others) == (["a.png"], 2)
    # Neither does one that comes later hang the command.
    reasons = dict(
        images.read_images(
            str(tmp_path), ["pipe.jpg", "zero.jpg"], size=8, resize="crop", threads=1
        )
    )
    assert reasons == {"pipe.jpg": "not a regular file", "zero.jpg": "not a regular file"}


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "BMP"])
def test_formats_are_told_by_the_content(tmp_path, format):
    image = picture(32, 32)
    image.save(tmp_path / "image.jpg", format=format)
    read = images.read_image(str(tmp_path / "image.jpg"), size=32, resize="squash")
    np.testing.assert_array_equal(read, np.asarray(image))


def test_an_image_with_too_many_pixels_is_a_bad_one(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    picture(10, 10).save(tmp_path / "image.png")
    (item,) = images.read_images(str(tmp_path), ["image.png"], size=8, resize="crop", threads=1)
    assert item == ("image.png", "10 x 10 pixels are more than 99")


@pytest.mark.parametrize(("height", "width"), [(300, 200), (97, 331), (64, 64), (40, 1000)])
@pytest.mark.parametrize("size", [64, 384])
def test_a_crop_equals_resizing_the_whole_image_first(tmp_path, height, width, size):
    """torchvision's Resize and CenterCrop, done with Pillow on the whole image."""
    image = picture(height, width)
    image.save(tmp_path / "image.png")
    shorter = int(size / 0.875) if size < 384 else size
    least = min(height, width)
    whole = image.resize(
        (width * shorter // least, height * shorter // least), Image.Resampling.BICUBIC
    )
    left, top = (round((side - size) / 2) for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), int)
    cropped = images.read_image(str(tmp_path / "image.png"), size=size, resize="crop")
    assert cropped.shape == (size, size, 3)
    assert np.abs(cropped - expected).max() <= 1  # Pillow rounds between its two passes


@pytest.mark.slow
def test_a_crop_equals_the_view_of_evaluation_in_training(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="training's view is TensorFlow's")
    from beit_jax.data.classify_views import eval_view

    picture(300, 211).save(tmp_path / "image.png")
    pixels = np.asarray(Image.open(tmp_path / "image.png"))
    view = eval_view(tf.constant(pixels), image_size=64).numpy().astype(int)
    cropped = images.read_image(str(tmp_path / "image.png"), size=64, resize="crop")
    # Pillow rounds and clips between its two passes, which shows at a sharp edge.
    assert np.abs(cropped - view).mean() < 0.3
    assert np.quantile(np.abs(cropped - view), 0.99) <= 1


def test_squashing_keeps_the_whole_image(tmp_path):
    image = picture(120, 40)
    image.save(tmp_path / "image.png")
    squashed = images.read_image(str(tmp_path / "image.png"), size=32, resize="squash")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(squashed, expected)


def test_orientation_palettes_grey_and_16_bits_become_upright_rgb(tmp_path):
    image = picture(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise to be seen upright
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = image.convert("L")
    grey.save(tmp_path / "grey.png")
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    image.quantize(256).save(tmp_path / "palette.gif")

    def read(name):
        return images.read_image(str(tmp_path / name), size=32, resize="squash")

    np.testing.assert_array_equal(read("turned.png"), np.asarray(image))
    as_rgb = np.asarray(grey.convert("RGB"))
    np.testing.assert_array_equal(read("grey.png"), as_rgb)
    np.testing.assert_array_equal(read("deep.png"), as_rgb)
    assert np.abs(read("palette.gif").astype(int) - np.asarray(image)).mean() < 8


def test_damaged_exif_data_does_not_lose_the_image(tmp_path, monkeypatch):
    picture(20, 30).save(tmp_path / "image.png")
    expected = images.read_image(str(tmp_path / "image.png"), size=20, resize="crop")

    def damaged(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(by_pillow.ImageOps, "exif_transpose", damaged)
    read = images.read_image(str(tmp_path / "image.png"), size=20, resize="crop")
    np.testing.assert_array_equal(read, expected)


def test_images_come_in_order_and_bad_ones_as_reasons(tmp_path):
    names = [f"{number:02}.png" for number in range(40)]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / name)
    whole = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "05.png").write_bytes(b"hello")
    (tmp_path / "07.png").unlink()
    read = list(images.read_images(str(tmp_path), names, size=8, resize="crop", threads=3))
    assert [name for name, _ in read] == names
    reasons = {name: image for name, image in read if isinstance(image, str)}
    assert sorted(reasons) == ["03.png", "05.png", "07.png"]
    assert "by its content" in reasons["05.png"]
    assert reasons["07.png"] == "No such file or directory"
    assert all(image[0, 0, 0] == int(name[:2]) for name, image in read if name not in reasons)


def test_only_a_bounded_number_of_images_is_read_ahead(monkeypatch):
    started = []
    lock = threading.Lock()

    def read_image(path, **_):
        with lock:
            started.append(path)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(images, "read_image", read_image)
    names = [str(number) for number in range(1000)]
    reader = images.read_images("folder", names, size=2, resize="crop", threads=2)
    next(reader)
    reader.close()
    assert len(started) <= 2 * images._AHEAD + 2
