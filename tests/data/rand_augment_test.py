"""Draws have timm's distributions, and applying them gives Pillow's results."""

import importlib.util
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from beit_jax.config import ClassifyAugmentConfig, ConfigError
from beit_jax.data import rand_augment

FILL = (124, 116, 104)
KEYS = 10_000

# Operations on integers and tables equal Pillow's bit for bit.
EXACT = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
# Elsewhere floating point numbers are cut to whole ones: one level apart where float32 lies just
# beside a whole number. On photographs that is no pixel in blends and 0.08 % in geometry; more
# where a move by tenths of a pixel meets few levels, whose mixtures are then often whole.
TOLERANCE, SHARE = 1, 0.03

MAGNITUDES = (0.0, 2.5, 6.1, 9.0, 9.7, 10.0)

GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _pillow(image: np.ndarray, *, operation: str, magnitude: float, sign: float) -> np.ndarray:
    """The operation with Pillow, with the recipe's arguments."""
    picture = Image.fromarray(image)
    level = float(np.float32(magnitude)) / 10
    signed = sign * level
    width, height = picture.size

    def affine(*matrix: float) -> Image.Image:
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=FILL,
        )

    def point(function) -> Image.Image:
        return picture.point([function(value) for value in range(256)] * 3)

    def enhance(enhancer: type) -> Image.Image:
        return enhancer(picture).enhance(1 + 0.9 * signed)

    results = {
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
        "rotate": lambda: picture.rotate(
            30 * signed, resample=Image.Resampling.BICUBIC, fillcolor=FILL
        ),
        # Newer Pillow refuses to keep zero bits; the recipe's version gave black.
        "posterize": lambda: (
            ImageOps.posterize(picture, 4 - int(4 * level)) if level < 1 else point(lambda _: 0)
        ),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(256 * level)),
        "solarize_add": lambda: point(
            lambda value: value + int(110 * level) if value < 128 else value
        ),
        "color": lambda: enhance(ImageEnhance.Color),
        "contrast": lambda: enhance(ImageEnhance.Contrast),
        "brightness": lambda: enhance(ImageEnhance.Brightness),
        "sharpness": lambda: enhance(ImageEnhance.Sharpness),
        "shear_x": lambda: affine(1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda: affine(1, 0, 0.45 * signed * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 0.45 * signed * height),
    }
    return np.asarray(results[operation]())


_apply = tf.function(rand_augment.apply_operation, autograph=False, reduce_retracing=True)


def _tensorflow(image: np.ndarray, *, operation: str, magnitude: float, sign: float) -> np.ndarray:
    return _apply(
        tf.constant(image),
        operation=operation,
        magnitude=tf.constant(magnitude, tf.float32),
        sign=tf.constant(sign, tf.float32),
        fill=FILL,
    ).numpy()


def _picture(seed: int, height: int, width: int) -> np.ndarray:
    """Gradients, edges and noise; channels of different range, the first over all levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = []
    for channel in range(3):
        a, b = rng.normal(size=2)
        values = 128 + 120 * np.sin(6 * (a * x + b * y)) + 40 * (x + y > 1)
        values += rng.normal(size=(height, width)) * 10
        channels.append(np.clip(values, 20 * channel, 255 - 30 * channel))
    return np.stack(channels, -1).astype(np.uint8)


PICTURES = {
    "square": _picture(0, 96, 96),
    "small": _picture(1, 32, 32),
    "wide": _picture(2, 45, 71),
    "tall": _picture(3, 60, 33),
    "tiny": _picture(4, 3, 3),
    "two levels": np.where(_picture(5, 20, 30) > 127, 200, 30).astype(np.uint8),
    # Equalising it exceeds 255, where Pillow's table is clipped.
    "one step": np.arange(510, dtype=np.uint8).repeat(3).reshape(17, 30, 3),
    "black": np.zeros((16, 16, 3), np.uint8),
    "white": np.full((16, 16, 3), 255, np.uint8),
}


def _check(image: np.ndarray, *, operation: str, magnitude: float, sign: float) -> None:
    arguments = {"operation": operation, "magnitude": magnitude, "sign": sign}
    actual, pillow = _tensorflow(image, **arguments), _pillow(image, **arguments)
    if operation in EXACT:
        np.testing.assert_array_equal(actual, pillow)
    else:
        difference = np.abs(actual.astype(int) - pillow)
        assert difference.max() <= TOLERANCE, arguments
        assert (difference > 0).mean() <= SHARE, arguments


@pytest.mark.parametrize("operation", rand_augment.OPERATIONS)
def test_operations_equal_pillow(operation):
    for image in PICTURES.values():
        for magnitude in MAGNITUDES:
            for sign in (1.0, -1.0):
                _check(image, operation=operation, magnitude=magnitude, sign=sign)


def test_operations_on_photographs_equal_pillow():
    folder = os.environ.get("BEIT_JAX_IMAGES")
    if not folder:
        pytest.skip("needs photographs: set BEIT_JAX_IMAGES to a folder of JPEGs")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() == ".jpeg")
    rng = np.random.default_rng(0)
    for number, path in enumerate(files[::20]):
        picture = Image.open(path).convert("RGB")
        # Resized as in training, and at their own size.
        image = np.asarray(picture.resize((224, 224)) if number % 2 else picture)
        for operation in rand_augment.OPERATIONS:
            magnitude, sign = np.clip(rng.normal(9, 0.5), 0, 9.99), rng.choice([-1.0, 1.0])
            _check(image, operation=operation, magnitude=magnitude, sign=sign)


def test_the_reference_is_timms(monkeypatch):
    """The level maps and calls above are those of timm's source, if timm is installed."""
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("compares with timm, which is not installed")
    # Only that file: the package as a whole needs torchvision.
    path = Path(package.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", path)
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)

    names = timm._RAND_INCREASING_TRANSFORMS
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    for operation, name in zip(rand_augment.OPERATIONS, names, strict=True):
        for magnitude in (0.5, 4.2, 9.0, 9.7):
            for sign in (1.0, -1.0):
                monkeypatch.setattr(random, "random", lambda sign=sign: 0.25 if sign > 0 else 0.75)
                level = float(np.float32(magnitude))
                apply = timm.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
                np.testing.assert_array_equal(
                    np.asarray(apply(Image.fromarray(PICTURES["wide"]))),
                    _pillow(PICTURES["wide"], operation=operation, magnitude=magnitude, sign=sign),
                    err_msg=name,
                )


@pytest.mark.parametrize("operation", GEOMETRY)
def test_geometry_at_magnitude_zero_is_the_identity(operation):
    image = PICTURES["wide"]
    same = _tensorflow(image, operation=operation, magnitude=0.0, sign=1.0)
    np.testing.assert_array_equal(same, image)


@pytest.mark.parametrize("operation", GEOMETRY)
def test_geometry_fills_gaps_and_keeps_uniform_surfaces(operation):
    image = np.full((40, 50, 3), (7, 200, 91), np.uint8)
    moved = _tensorflow(image, operation=operation, magnitude=9.3, sign=-1.0)
    colours = {tuple(colour) for colour in np.unique(moved.reshape(-1, 3), axis=0).tolist()}
    assert colours == {FILL, (7, 200, 91)}


def test_an_operation_can_be_named_by_its_index():
    image = tf.constant(PICTURES["small"])
    arguments = {"magnitude": tf.constant(9.0), "sign": tf.constant(1.0), "fill": FILL}
    for position, name in enumerate(rand_augment.OPERATIONS):
        np.testing.assert_array_equal(
            _apply(image, operation=tf.constant(position), **arguments),
            _apply(image, operation=name, **arguments),
        )
    with pytest.raises(ConfigError, match="cutout"):
        rand_augment.apply_operation(image, operation="cutout", **arguments)


def test_drawn_operations_are_applied_one_after_the_other():
    """In a tf.data graph without static sizes; operations that are not applied are skipped."""
    image = PICTURES["tall"]
    position = rand_augment.OPERATIONS.index
    parameters = {
        "operation": tf.constant([position("shear_y"), position("invert"), position("equalize")]),
        "applied": tf.constant([True, False, True]),
        "magnitude": tf.constant([9.0, 9.0, 3.0]),
        "sign": tf.constant([-1.0, 1.0, 1.0]),
    }
    images = tf.data.Dataset.from_generator(
        lambda: iter([image]), output_signature=tf.TensorSpec([None, None, 3], tf.uint8)
    )
    views = images.map(lambda image: rand_augment.apply(image, parameters=parameters, fill=FILL))
    sheared = _tensorflow(image, operation="shear_y", magnitude=9.0, sign=-1.0)
    expected = _tensorflow(sheared, operation="equalize", magnitude=3.0, sign=1.0)
    np.testing.assert_array_equal(next(views.as_numpy_iterator()), expected)


def test_without_operations_nothing_changes():
    drawn = rand_augment.draw(
        tf.constant([1, 2], tf.int64), config=ClassifyAugmentConfig(operations=0)
    )
    image = PICTURES["wide"]
    np.testing.assert_array_equal(
        rand_augment.apply(tf.constant(image), parameters=drawn, fill=FILL), image
    )


# ---------------------------------------------------------------------------- drawing


def _draw_many(number: int, **settings) -> dict[str, np.ndarray]:
    config = ClassifyAugmentConfig(**settings)

    def draw(position):
        return rand_augment.draw(tf.stack([tf.constant(2, tf.int64), position]), config=config)

    return next(tf.data.Dataset.range(number).map(draw).batch(number).as_numpy_iterator())


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return _draw_many(KEYS, operations=3)


def test_drawing_is_a_function_of_the_key():
    config = ClassifyAugmentConfig(operations=8)
    first, again, other = (
        rand_augment.draw(tf.constant([3, number], tf.int64), config=config) for number in (5, 5, 6)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name].numpy() != other[name].numpy()).any(), name


def test_operations_are_equally_likely_and_independent(drawn):
    operation = drawn["operation"]
    assert operation.shape == (KEYS, 3)
    assert operation.dtype == np.int32
    count = len(rand_augment.OPERATIONS)
    assert count == 15
    share = np.stack([np.bincount(column, minlength=count) for column in operation.T]) / KEYS
    # Four standard errors, at every position.
    np.testing.assert_allclose(share, 1 / 15, atol=4 * math.sqrt(1 / 15 * 14 / 15 / KEYS))
    # With replacement: the same operation twice one time in 15.
    twice = (operation[:, 0] == operation[:, 1]).mean()
    assert twice == pytest.approx(1 / 15, abs=4 * math.sqrt(1 / 15 * 14 / 15 / KEYS))


def test_half_are_applied_and_half_are_negated(drawn):
    bound = 4 * 0.5 / math.sqrt(KEYS)
    np.testing.assert_allclose(drawn["applied"].mean(0), 0.5, atol=bound)
    assert set(np.unique(drawn["sign"])) == {-1.0, 1.0}
    np.testing.assert_allclose((drawn["sign"] > 0).mean(0), 0.5, atol=bound)
    assert not _draw_many(100, operation_probability=0.0)["applied"].any()
    assert _draw_many(100, operation_probability=1.0)["applied"].all()


def _normal_below(value: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.atleast_1d(value)])


@pytest.mark.parametrize(("mean", "std"), [(9.0, 0.5), (1.0, 2.0)])
def test_magnitudes_are_normal_and_clipped(mean, std):
    magnitude = _draw_many(KEYS, magnitude=mean, magnitude_std=std)["magnitude"].ravel()
    assert magnitude.min() >= 0
    assert magnitude.max() <= 10
    values = np.linspace(0, 10, 101)[1:-1]
    actual = (magnitude[:, None] <= values).mean(0)
    # The Kolmogorov-Smirnov bound at 1 in 10,000; a standard deviation 5 % off exceeds it.
    bound = 2.23 / math.sqrt(magnitude.size)
    assert np.abs(actual - _normal_below((values - mean) / std)).max() < bound
    for end, expected in ((0, _normal_below(-mean / std)), (10, _normal_below((mean - 10) / std))):
        spread = math.sqrt(expected[0] * (1 - expected[0]) / magnitude.size)
        assert (magnitude == end).mean() == pytest.approx(expected[0], abs=4 * spread + 1e-9)


def test_magnitudes_without_spread_are_all_the_same():
    np.testing.assert_array_equal(_draw_many(50, magnitude_std=0.0)["magnitude"], 9.0)


def test_draws_are_independent(drawn):
    columns = np.concatenate(
        [drawn[name].astype(float) for name in ("operation", "applied", "magnitude", "sign")], 1
    )
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 4.5 / math.sqrt(KEYS)
