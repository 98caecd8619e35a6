"""Draws have torchvision's distributions, and applying them gives Pillow's results."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance

from beit_jax.config import AugmentConfig
from beit_jax.data import augment, decode, jitter, resizing
from beit_jax.training import device_jitter

# Mean absolute difference from Pillow, of 255. Real photographs come to 0.35 on average.
TOLERANCE = 1.5

SIZE, TOKEN_SIZE = 224, 112
ORDERS = list(itertools.permutations(range(3)))


@tf.function(reduce_retracing=True)
def _views(image, parameters):
    return augment.apply_views(
        image, parameters=parameters, image_size=SIZE, token_image_size=TOKEN_SIZE
    )


def _parameters(*, box, factors=(1, 1, 1), order=(0, 1, 2), flip=False) -> augment.Parameters:
    return {
        "box": tf.constant(box, tf.int32),
        "factors": tf.constant(factors, tf.float32),
        "order": tf.constant(order, tf.int32),
        "flip": tf.constant(flip),
    }


def _pillow_views(image: np.ndarray, parameters: augment.Parameters) -> dict[str, np.ndarray]:
    """The official pipeline with Pillow: jitter, flip, crop, two resizes."""
    picture = Image.fromarray(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in parameters["order"].numpy():
        picture = enhancers[which](picture).enhance(float(parameters["factors"][which]))
    if parameters["flip"]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = parameters["box"].numpy().tolist()
    crop = picture.crop((left, top, left + width, top + height))
    return {
        "image": np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)),
        "token_image": np.asarray(crop.resize((TOKEN_SIZE,) * 2, Image.Resampling.LANCZOS)),
    }


def _difference(image: np.ndarray, parameters: augment.Parameters) -> dict[str, float]:
    actual, pillow = _views(tf.constant(image), parameters), _pillow_views(image, parameters)
    return {
        name: float(np.abs(actual[name].numpy().astype(int) - pillow[name].astype(int)).mean())
        for name in pillow
    }


def _photo(seed: int, height: int, width: int) -> np.ndarray:
    """An image with a photograph's falling spectrum and levels that reach both ends."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = []
    for _ in range(3):
        values = np.full((height, width), rng.uniform(90, 160))
        for octave in range(6):
            fx, fy = rng.normal(size=2) * 2 * 2**octave
            values += 70 / 1.6**octave * np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6))
        channels.append(values)
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


BOXES = [(0, 0, 375, 500), (40, 100, 250, 230), (300, 10, 60, 45), (0, 499, 1, 1)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factors", [(0.6, 1.4, 0.8), (1.4, 0.6, 1.4), (1.3, 1.4, 1.4)])
def test_views_equal_pillow(order, factors):
    image = _photo(sum(order[:2]), 375, 500)
    for box, flip in itertools.product(BOXES, (False, True)):
        parameters = _parameters(box=box, factors=factors, order=order, flip=flip)
        for name, difference in _difference(image, parameters).items():
            assert difference < TOLERANCE, (name, box, flip)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (31, 2), (900, 700)])
def test_views_equal_pillow_at_odd_sizes(height, width):
    image = _photo(7, height, width)
    parameters = _parameters(box=(0, 0, height, width), factors=(0.9, 1.2, 1.3), order=(2, 1, 0))
    for name, difference in _difference(image, parameters).items():
        assert difference < TOLERANCE, name


def test_views_of_photographs_equal_pillow():
    folder = os.environ.get("BEIT_JAX_IMAGES")
    if not folder:
        pytest.skip("needs photographs: set BEIT_JAX_IMAGES to a folder of JPEGs")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() == ".jpeg")
    for number, path in enumerate(files[::8]):
        image = np.asarray(Image.open(path).convert("RGB"))
        drawn = _draw(number, *image.shape[:2])
        # Every order, and the strongest possible jitter in every other image.
        drawn["order"] = tf.constant(ORDERS[number % 6])
        if number % 2:
            drawn["factors"] = tf.constant([(0.6, 1.4)[number >> bit & 1] for bit in (1, 2, 3)])
        for name, difference in _difference(image, drawn).items():
            assert difference < TOLERANCE, (name, path)


def _jitter(image: np.ndarray, *, factors, order) -> np.ndarray:
    steps = jitter.jitter_steps(
        tf.constant(image), factors=tf.constant(factors, tf.float32), order=tf.constant(order)
    )
    return (jitter.apply_jitter(tf.constant(image), steps=steps) + steps.offset).numpy()


def _pillow_jitter(image: np.ndarray, *, factors, order) -> np.ndarray:
    picture = Image.fromarray(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in order:
        picture = enhancers[which](picture).enhance(factors[which])
    return np.asarray(picture)


@pytest.mark.parametrize("factors", [(1.37, 0.71, 1.39), (0.63, 1.38, 0.71), (1.31, 1.39, 0.66)])
def test_jitter_equals_pillows_at_every_pixel_of_a_small_image(factors):
    """Up to the difference between truncating and subtracting half a level, three times over."""
    image = _photo(3, 100, 120)  # fewer pixels than MEAN_SAMPLES
    for order in ORDERS:
        actual = _jitter(image, factors=factors, order=order)
        difference = actual - _pillow_jitter(image, factors=factors, order=order)
        assert np.abs(difference).max() < 3
        assert np.abs(difference).mean() < 0.6
        assert abs(difference.mean()) < 0.15  # the same truncation on average


def test_no_jitter_is_the_identity():
    image = _photo(4, 50, 60)
    for order in ORDERS:
        np.testing.assert_array_equal(_jitter(image, factors=(1, 1, 1), order=order), image)


def test_a_factor_of_zero_gives_black_or_the_mean_grey():
    image = _photo(5, 50, 60)
    black = _jitter(image, factors=(0, 1, 1), order=(0, 1, 2))
    np.testing.assert_allclose(black, 0, atol=0.5)
    plain = _jitter(image, factors=(1, 0, 1), order=(2, 0, 1))
    mean = np.asarray(Image.fromarray(image).convert("L")).mean()
    np.testing.assert_allclose(plain, mean, atol=1.1)


def test_grey_images_stay_grey():
    image = np.repeat(_photo(5, 50, 60)[..., :1], 3, -1)
    result = _jitter(image, factors=(0.7, 1.3, 1.4), order=(2, 0, 1))
    assert np.ptp(result, axis=-1).max() < 1e-3


# ---------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (40, 300), (1, 1), (7, 64), (900, 31)])
def test_resizing_equals_tensorflows(method, height, width):
    image = _photo(11, height, width)
    actual = resizing.resize(tf.constant(image), size=64, method=method).numpy().astype(int)
    whole = tf.image.resize(image, [64, 64], method=method, antialias=True)
    reference = np.clip(np.round(whole), 0, 255)
    assert np.abs(actual - reference).max() <= 1
    assert (actual != reference).mean() < 1e-3  # where rounding was close


# ---------------------------------------------------------------------------- fast views


def _encode_jpeg(image: np.ndarray) -> tf.Tensor:
    return tf.io.encode_jpeg(image, quality=92, chroma_downsampling=True)


def _decode_window(data: tf.Tensor, window: decode.Window) -> np.ndarray:
    in_graph = tf.function(
        lambda data: decode.decode_window(data, window=window, exif_orientation=True)
    )
    return in_graph(data).numpy()


@pytest.mark.parametrize("seed", range(4))
def test_decoding_a_window_equals_cropping_to_it(seed):
    data = _encode_jpeg(_photo(seed, 375, 500))
    drawn = _draw(seed, 375, 500)
    box = augment.unflipped_box(drawn, width=tf.constant(500))
    window = decode.Window(box=lambda height, width: box, side=SIZE)
    crop = _decode_window(data, window)
    top, left, height, width = box.numpy()
    whole = decode.decode_image(data, exif_orientation=True)
    difference = np.abs(crop.astype(int) - whole[top : top + height, left : left + width].numpy())
    assert difference[:, 1:-1].max() == 0
    # Chroma at half the resolution is interpolated, and at the sides its neighbours are missing.
    assert difference.max() < 16


@pytest.mark.parametrize(("side", "shape"), [(400, (400, 600)), (200, (200, 300)), (40, (50, 75))])
def test_a_large_window_is_decoded_at_a_lower_resolution(side, shape):
    data = _encode_jpeg(_photo(1, 500, 700))
    window = decode.Window(box=lambda height, width: tf.constant([50, 40, 400, 600]), side=side)
    crop = _decode_window(data, window)
    assert crop.shape[:2] == shape
    whole = decode.decode_image(data, exif_orientation=True)[50:450, 40:640]
    small = tf.image.resize(whole, shape, method="area")
    assert np.abs(crop - small.numpy()).mean() < 6


@pytest.mark.parametrize("kind", ["png", "turned"])
def test_other_images_are_cropped_after_decoding(kind):
    image = _photo(2, 60, 90)
    if kind == "png":
        data, expected = tf.io.encode_png(image), image
    else:
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6  # to be rotated clockwise
        Image.fromarray(image).save(buffer, "JPEG", exif=exif)
        data = tf.constant(buffer.getvalue())
        expected = decode.decode_image(data, exif_orientation=True).numpy()
        assert expected.shape[:2] == (90, 60)
    window = decode.Window(box=lambda height, width: tf.constant([5, 10, 40, 30]), side=4)
    crop = _decode_window(data, window)
    np.testing.assert_array_equal(crop, expected[5:45, 10:40])


@pytest.mark.parametrize("flip", [False, True])
def test_fast_views_without_jitter_are_close_to_the_official_ones(flip):
    image = _photo(8, 375, 500)
    parameters = _parameters(box=(40, 100, 250, 330), flip=flip)
    left = 500 - 100 - 330 if flip else 100
    crop = tf.constant(image[40:290, left : left + 330])
    fast = augment.fast_views(
        crop, parameters=parameters, image_size=SIZE, token_image_size=TOKEN_SIZE
    )
    official = _views(tf.constant(image), parameters)
    np.testing.assert_array_equal(fast["image"], official["image"])
    difference = fast["token_image"].numpy().astype(int) - official["token_image"].numpy()
    assert np.abs(difference).mean() < 1
    alone = augment.fast_views(crop, parameters=parameters, image_size=SIZE, token_image_size=None)
    np.testing.assert_array_equal(alone["image"], fast["image"])


def test_jitter_on_the_device_equals_pillows_jitter_of_the_view():
    views = np.stack([_photo(seed, 48, 48) for seed in range(6)])
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (6, 3)).astype(np.float32)
    result = device_jitter.jitter(views, factors=factors, order=np.array(ORDERS, np.int32))
    assert result.dtype == np.uint8
    for number, order in enumerate(ORDERS):
        pillow = _pillow_jitter(views[number], factors=factors[number].tolist(), order=order)
        difference = np.abs(np.asarray(result[number]).astype(int) - pillow)
        # float32 rounds differently from Pillow's double precision at a few pixels.
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_draws_without_the_image_size_are_the_same():
    whole = _draw(5, 375, 500)
    part = augment.draw_jitter_and_flip(tf.constant([1, 5], tf.int64), config=AugmentConfig())
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name])


def test_flip_mirrors_both_views():
    image = _photo(6, 90, 130)
    box = (10, 20, 50, 60)
    plain = _views(tf.constant(image), _parameters(box=box))
    # The same box in an image that was mirrored beforehand.
    flipped = _views(tf.constant(image[:, ::-1].copy()), _parameters(box=box, flip=True))
    for name in plain:  # except for rounding: views are mirrored after resizing
        difference = np.abs(flipped[name].numpy().astype(int) - plain[name].numpy())
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    mirrored = (10, 130 - 20 - 60, 50, 60)
    flipped = _views(tf.constant(image), _parameters(box=mirrored, flip=True))
    for name in plain:
        np.testing.assert_allclose(
            flipped[name].numpy().astype(int), plain[name].numpy()[:, ::-1].astype(int), atol=1
        )


def test_segmentation_follows_the_image():
    # Classes painted as colours: except at edges, the nearest class must be the view's colour.
    y, x = np.mgrid[:90, :120]
    segmentation = ((x // 30) + 4 * (y // 30)).astype(np.uint8)
    image = np.repeat((segmentation * 20)[..., None], 3, -1)
    parameters = _parameters(box=(5, 10, 70, 100), flip=True)
    view = _views(tf.constant(image), parameters)["image"].numpy()[..., 0] / 20
    result = augment.apply_segmentation(segmentation, parameters=parameters, size=SIZE).numpy()
    assert set(np.unique(result)) <= set(range(12))
    assert (np.abs(view - result) < 0.5).mean() > 0.95


# ---------------------------------------------------------------------------- evaluation


def test_eval_views_are_the_centred_square():
    for height, width in ((375, 500), (500, 375), (64, 64), (1, 9)):
        image = _photo(8, height, width)
        side = min(height, width)
        box = ((height - side) // 2, (width - side) // 2, side, side)
        views = augment.eval_views(image, image_size=SIZE, token_image_size=TOKEN_SIZE)
        expected = _pillow_views(image, _parameters(box=box))
        for name, view in views.items():
            assert np.abs(view.numpy().astype(int) - expected[name]).mean() < TOLERANCE


def test_an_image_of_the_right_size_is_unchanged():
    image = _photo(9, SIZE, SIZE)
    views = augment.eval_views(image, image_size=SIZE, token_image_size=TOKEN_SIZE)
    np.testing.assert_array_equal(views["image"], image)


# ---------------------------------------------------------------------------- drawing


def _draw(number: int, height: int, width: int, **settings) -> augment.Parameters:
    return augment.draw_parameters(
        tf.constant([1, number], tf.int64),
        height=tf.constant(height),
        width=tf.constant(width),
        config=AugmentConfig(**settings),
    )


def _draw_many(number: int, height: int, width: int, **settings) -> dict[str, np.ndarray]:
    positions = tf.data.Dataset.range(number)
    config = AugmentConfig(**settings)

    def draw(position):
        key = tf.stack([tf.constant(2, tf.int64), position])
        return augment.draw_parameters(
            key, height=tf.constant(height), width=tf.constant(width), config=config
        )

    return next(positions.map(draw).batch(number).as_numpy_iterator())


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return _draw_many(12_000, 375, 500)


def test_drawing_is_a_function_of_the_key():
    first, again, other = _draw(3, 375, 500), _draw(3, 375, 500), _draw(4, 375, 500)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["factors"].numpy() != other["factors"].numpy()).all()


def test_factors_are_uniform_in_their_range(drawn):
    factors = drawn["factors"]
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    # Standard errors of a uniform's mean and of its deciles, four times.
    np.testing.assert_allclose(factors.mean(0), 1.0, atol=4 * 0.8 / np.sqrt(12 * 12_000))
    for channel in factors.T:
        counts = np.histogram(channel, 10, (0.6, 1.4))[0]
        np.testing.assert_allclose(counts / 12_000, 0.1, atol=4 * 0.3 / np.sqrt(12_000))
    correlation = np.corrcoef(factors.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(12_000)


def test_orders_are_equally_likely(drawn):
    orders, counts = np.unique(drawn["order"], axis=0, return_counts=True)
    assert {tuple(order) for order in orders.tolist()} == set(ORDERS)
    spread = np.sqrt(1 / 6 * 5 / 6 / 12_000)
    np.testing.assert_allclose(counts / 12_000, 1 / 6, atol=4 * spread)


def test_half_are_flipped(drawn):
    assert drawn["flip"].mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(12_000))
    assert not _draw_many(50, 375, 500, flip=False)["flip"].any()


def _torchvision_boxes(number: int, height: int, width: int) -> np.ndarray:
    """The crop box in plain Python."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(number):
        for _ in range(10):
            area = height * width * rng.uniform(0.08, 1)
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                break
        else:
            ratio = width / height
            w, h = width, height
            if ratio < 3 / 4:
                h = round(w / (3 / 4))
            elif ratio > 4 / 3:
                w = round(h * (4 / 3))
            top, left = (height - h) // 2, (width - w) // 2
        boxes.append((top, left, h, w))
    return np.array(boxes)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (400, 220)])
def test_crop_boxes_are_distributed_as_torchvision_has_them(drawn, height, width):
    boxes = (drawn if height == 375 else _draw_many(12_000, height, width))["box"].astype(float)
    expected = _torchvision_boxes(12_000, height, width).astype(float)
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    area, aspect = h * w / (height * width), w / h
    assert area.min() > 0.08 * 0.98  # rounding of the sides
    assert area.max() <= 1
    assert aspect.min() > 0.75 * 0.98
    assert aspect.max() < 4 / 3 * 1.02
    official_area = expected[:, 2] * expected[:, 3] / (height * width)
    quantiles = np.linspace(0.02, 0.98, 25)
    for actual, reference, scale in (
        (area, official_area, 1),
        (aspect, expected[:, 3] / expected[:, 2], 1),
        (top, expected[:, 0], height),
        (left, expected[:, 1], width),
    ):
        difference = np.quantile(actual, quantiles) - np.quantile(reference, quantiles)
        assert np.abs(difference / scale).max() < 0.03


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (0, 493, 10, 13)),  # 10 * 4/3 = 13.3 wide
        (1000, 10, (493, 0, 13, 10)),
        (1, 1000, (0, 499, 1, 1)),
    ],
)
def test_without_a_crop_that_fits_the_centre_is_taken(height, width, box):
    boxes = _draw_many(50, height, width, min_crop_scale=0.9)["box"]
    np.testing.assert_array_equal(boxes, np.tile(box, (50, 1)))


def test_one_pixel_can_be_cropped():
    np.testing.assert_array_equal(_draw_many(50, 1, 1)["box"], np.tile((0, 0, 1, 1), (50, 1)))


def test_crops_keep_to_the_crop_scale():
    boxes = _draw_many(500, 300, 300, min_crop_scale=0.3, max_crop_scale=0.5)["box"]
    area = boxes[:, 2] * boxes[:, 3] / 300**2
    assert area.min() > 0.3 * 0.99
    assert area.max() < 0.5 * 1.01
