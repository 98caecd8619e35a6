"""Photometric distortion equals OpenCV's, level by level."""

import cv2
import numpy as np
import pytest
import tensorflow as tf

from beit_jax.config import SegmentAugmentConfig
from beit_jax.data import photometric

BGR = (2, 1, 0)
# OpenCV converts the pixels of a row in vectors, and rounds instead of truncating where the rest of
# a row fills none. Widths are multiples of this, so that there is no rest.
VECTOR = 64


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    """Random colours, greys and pure ones: uint8 [h, w, 3], RGB."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 2 * VECTOR, 3)).astype(np.uint8)
    image[:8] = image[:8, :, :1]
    image[8:16] = rng.choice([0, 255], (8, 2 * VECTOR, 3))
    image[16:24] //= 32
    return image


def _official(image: np.ndarray, drawn: dict) -> np.ndarray:
    """The steps in the official order, on BGR, with OpenCV's conversions."""

    def convert(levels, scale=1.0, shift=0.0):
        changed = levels.astype(np.float32) * np.float32(scale) + np.float32(shift)
        return np.clip(changed, 0, 255).astype(np.uint8)

    brightness, contrast, saturation, hue = drawn["taken"].numpy()
    picture = np.ascontiguousarray(image[..., BGR])
    if brightness:
        picture = convert(picture, shift=drawn["brightness"].numpy())
    if contrast and drawn["contrast_first"]:
        picture = convert(picture, drawn["contrast"].numpy())
    if saturation:
        hsv = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = convert(hsv[..., 1], drawn["saturation"].numpy())
        picture = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if hue:
        hsv = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + int(drawn["hue"])) % 180
        picture = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if contrast and not drawn["contrast_first"]:
        picture = convert(picture, drawn["contrast"].numpy())
    return picture[..., BGR]


def _draw_many(number: int, config: SegmentAugmentConfig) -> dict:
    keys = tf.data.Dataset.range(number).map(lambda i: tf.stack([tf.constant(3, tf.int64), i]))
    drawn = keys.map(lambda key: photometric.draw(key, config=config))
    return next(drawn.batch(number).as_numpy_iterator())


def test_hue_saturation_and_value_are_opencvs(colours):
    ours = np.stack(photometric.to_hsv(tf.constant(colours)), -1).reshape(colours.shape)
    np.testing.assert_array_equal(ours, cv2.cvtColor(colours, cv2.COLOR_RGB2HSV))


def test_colours_of_hue_saturation_and_value_are_opencvs():
    hues, saturations, values = np.meshgrid(
        np.arange(180), np.arange(3, 256, 4), np.arange(0, 256, 5), indexing="ij"
    )
    hsv = np.stack([hues, saturations, values], -1).astype(np.uint8).reshape(180, -1, 3)
    assert hsv.shape[1] % VECTOR == 0
    flat = (tf.constant(hsv[..., channel].reshape(-1), tf.int32) for channel in range(3))
    ours = photometric.to_rgb(*flat, shape=tf.constant(hsv.shape)).numpy().astype(int)
    differences = np.abs(ours - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 2e-4


def test_every_combination_of_steps_equals_opencvs(colours):
    """With each subset of the four steps, and contrast first or last."""
    apply = tf.function(lambda parameters: photometric.apply(colours, parameters=parameters))
    amounts = {"brightness": -21.6, "contrast": 1.37, "saturation": 0.71}
    for number in range(32):
        drawn = {name: tf.constant(value) for name, value in amounts.items()}
        drawn["hue"] = tf.constant((-18, 17, 5)[number % 3])
        drawn["taken"] = tf.constant([bool(number >> step & 1) for step in range(4)])
        drawn["contrast_first"] = tf.constant(number >= 16)
        differences = np.abs(apply(drawn).numpy().astype(int) - _official(colours, drawn))
        # One level in hue or saturation is up to 255 / 30 of a colour's after the second step.
        assert (differences > 0).mean() < 2e-3, number
        assert differences.max() <= 9, number


def test_draws_fill_their_ranges():
    drawn = _draw_many(4000, SegmentAugmentConfig())
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
    ):
        assert low <= drawn[name].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < drawn[name].max() <= high
        assert abs(drawn[name].mean() - (low + high) / 2) < 0.03 * (high - low)
    # Official: a whole number from -18 on, and below 18.
    np.testing.assert_array_equal(np.unique(drawn["hue"]), np.arange(-18, 18))
    flags = np.column_stack([drawn["taken"], drawn["contrast_first"]])
    assert (np.abs(flags.mean(0) - 0.5) < 0.03).all()
    assert (np.abs(np.corrcoef(flags.T) - np.eye(5)) < 0.06).all()


def test_a_range_of_zero_is_a_step_that_is_never_taken():
    config = SegmentAugmentConfig(brightness=0, contrast=0, saturation=0, hue=0)
    assert not _draw_many(64, config)["taken"].any()
