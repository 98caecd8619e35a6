"""Augmentation: what is drawn has torchvision's distributions, what is applied equals Pillow."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance

from beit_jax.config import AugmentConfig
from beit_jax.data import augment

# Mean absolute difference from Pillow, of 255. Real photographs come to 0.2 on average.
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
    """The official order of things, with Pillow: jitter, flip, crop, resize twice."""
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
    ours, pillow = _views(tf.constant(image), parameters), _pillow_views(image, parameters)
    return {
        name: float(np.abs(ours[name].numpy().astype(int) - pillow[name].astype(int)).mean())
        for name in pillow
    }


def _photo(seed: int, height: int, width: int) -> np.ndarray:
    """A picture with a photograph's falling spectrum, bright and dark enough to be clipped."""
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
        # Every order, and in every other image the strongest jitter there is.
        drawn["order"] = tf.constant(ORDERS[number % 6])
        if number % 2:
            drawn["factors"] = tf.constant([(0.6, 1.4)[number >> bit & 1] for bit in (1, 2, 3)])
        for name, difference in _difference(image, drawn).items():
            assert difference < TOLERANCE, (name, path)


def test_jitter_equals_pillow_bit_for_bit_where_it_sees_every_pixel():
    image = _photo(3, 100, 120)  # fewer pixels than MEAN_SAMPLES
    for order in ORDERS:
        factors = (1.3, 0.7, 1.4)
        picture = Image.fromarray(image)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in order:
            picture = enhancers[which](picture).enhance(factors[which])
        ours = augment.jitter(image, factors=tf.constant(factors), order=tf.constant(order))
        # One level at a few places: float32 where Pillow's C has float64 in between.
        difference = np.abs(ours.numpy().astype(int) - np.asarray(picture))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_no_jitter_is_the_identity():
    image = _photo(4, 50, 60)
    for order in ORDERS:
        same = augment.jitter(image, factors=tf.ones(3), order=tf.constant(order))
        np.testing.assert_array_equal(same, image)


def test_grey_images_stay_grey():
    image = np.repeat(_photo(5, 50, 60)[..., :1], 3, -1)
    result = augment.jitter(
        image, factors=tf.constant([0.7, 1.3, 1.4]), order=tf.constant([2, 0, 1])
    )
    assert (np.ptp(result.numpy(), axis=-1) == 0).all()


def test_flip_mirrors_both_views():
    image = _photo(6, 90, 130)
    box = (10, 20, 50, 60)
    plain = _views(tf.constant(image), _parameters(box=box))
    # The same box in the image mirrored beforehand.
    flipped = _views(tf.constant(image[:, ::-1].copy()), _parameters(box=box, flip=True))
    for name in plain:
        np.testing.assert_array_equal(flipped[name], plain[name])
    mirrored = (10, 130 - 20 - 60, 50, 60)
    flipped = _views(tf.constant(image), _parameters(box=mirrored, flip=True))
    for name in plain:
        np.testing.assert_allclose(
            flipped[name].numpy().astype(int), plain[name].numpy()[:, ::-1].astype(int), atol=1
        )


def test_segmentation_follows_the_image():
    # Classes painted as colours: the nearest class must be the view's colour, edges aside.
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


def test_an_image_of_the_right_size_comes_through_unchanged():
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
    places = tf.data.Dataset.range(number)
    config = AugmentConfig(**settings)

    def draw(place):
        key = tf.stack([tf.constant(2, tf.int64), place])
        return augment.draw_parameters(
            key, height=tf.constant(height), width=tf.constant(width), config=config
        )

    return next(places.map(draw).batch(number).as_numpy_iterator())


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
    theirs = expected[:, 2] * expected[:, 3] / (height * width)
    quantiles = np.linspace(0.02, 0.98, 25)
    for ours, reference, scale in (
        (area, theirs, 1),
        (aspect, expected[:, 3] / expected[:, 2], 1),
        (top, expected[:, 0], height),
        (left, expected[:, 1], width),
    ):
        difference = np.quantile(ours, quantiles) - np.quantile(reference, quantiles)
        assert np.abs(difference / scale).max() < 0.03


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (0, 493, 10, 13)),  # 10 * 4/3 = 13.3 wide
        (1000, 10, (493, 0, 13, 10)),
        (1, 1000, (0, 499, 1, 1)),
    ],
)
def test_where_no_crop_fits_the_centre_is_taken(height, width, box):
    boxes = _draw_many(50, height, width, min_crop_scale=0.9)["box"]
    np.testing.assert_array_equal(boxes, np.tile(box, (50, 1)))


def test_one_pixel_can_be_cropped():
    np.testing.assert_array_equal(_draw_many(50, 1, 1)["box"], np.tile((0, 0, 1, 1), (50, 1)))


def test_crop_scale_is_kept_to():
    boxes = _draw_many(500, 300, 300, min_crop_scale=0.3, max_crop_scale=0.5)["box"]
    area = boxes[:, 2] * boxes[:, 3] / 300**2
    assert area.min() > 0.3 * 0.99
    assert area.max() < 0.5 * 1.01
