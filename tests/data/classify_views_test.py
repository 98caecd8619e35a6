"""Views for classification equal Pillow's, and are a function of the key alone."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax import preprocessing
from beit_jax.config import ClassifyAugmentConfig
from beit_jax.data import classify_views, rand_augment

# Mean absolute difference from Pillow, of 255; photographs come to 0.15. Pillow also rounds and
# clips between its two passes.
TOLERANCE = 1.5
SIZE = 224
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
PLAIN = ClassifyAugmentConfig(operations=0)


def _photo(seed: int, height: int, width: int) -> np.ndarray:
    """An image with a photograph's falling spectrum."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = []
    for _ in range(3):
        values = np.full((height, width), rng.uniform(90, 160))
        for octave in range(6):
            fx, fy = rng.normal(size=2) * 2 * 2**octave
            values += 60 / 1.6**octave * np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6))
        channels.append(values)
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def _key(number: int) -> tf.Tensor:
    return tf.constant([1, number], tf.int64)


def _view(image: np.ndarray, number: int, config=PLAIN, size=SIZE) -> np.ndarray:
    return classify_views.training_view(
        tf.constant(image), _key(number), config=config, image_size=size, normalization="half"
    ).numpy()


def _drawn(image: np.ndarray, number: int, config=PLAIN) -> classify_views.Parameters:
    return classify_views.draw_parameters(
        _key(number),
        height=tf.constant(image.shape[0]),
        width=tf.constant(image.shape[1]),
        config=config,
    )


def _draw_many(number: int, config: ClassifyAugmentConfig) -> classify_views.Parameters:
    def draw(position):
        key = tf.stack([tf.constant(2, tf.int64), position])
        return classify_views.draw_parameters(
            key, height=tf.constant(375), width=tf.constant(500), config=config
        )

    return next(tf.data.Dataset.range(number).map(draw).batch(number).as_numpy_iterator())


def _pillow_view(image: np.ndarray, drawn, *, interpolation="bicubic", size=SIZE) -> np.ndarray:
    top, left, height, width = drawn["box"].numpy().tolist()
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    view = crop.resize((size, size), RESAMPLING[interpolation])
    if drawn["flip"]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)


def _difference(actual: np.ndarray, pillow: np.ndarray) -> float:
    assert actual.shape == pillow.shape
    return float(np.abs(actual.astype(int) - pillow).mean())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, SIZE])
def test_crop_and_flip_equal_pillow(interpolation, size):
    config = ClassifyAugmentConfig(operations=0, interpolation=interpolation)
    image = _photo(1, 375, 500)
    flips = set()
    for number in range(12):
        drawn = _drawn(image, number, config)
        flips.add(bool(drawn["flip"]))
        pillow = _pillow_view(image, drawn, interpolation=interpolation, size=size)
        assert _difference(_view(image, number, config, size), pillow) < TOLERANCE
    assert flips == {False, True}


def test_views_of_photographs_equal_pillow():
    folder = os.environ.get("BEIT_JAX_IMAGES")
    if not folder:
        pytest.skip("needs photographs: set BEIT_JAX_IMAGES to a folder of JPEGs")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() == ".jpeg")
    for number, path in enumerate(files[::8]):
        image = np.asarray(Image.open(path).convert("RGB"))
        pillow = _pillow_view(image, _drawn(image, number))
        assert _difference(_view(image, number), pillow) < TOLERANCE, path
        for size in (SIZE, 384):
            actual = classify_views.eval_view(tf.constant(image), image_size=size).numpy()
            assert _difference(actual, _pillow_eval_view(image, size=size)) < TOLERANCE, path


def test_a_view_is_a_function_of_the_key():
    image = _photo(2, 90, 120)
    config = ClassifyAugmentConfig()
    views = [_view(image, number, config, 64) for number in (3, 3, 4)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).mean() > 0.5


def test_rand_augment_comes_after_crop_and_flip():
    image = _photo(3, 200, 150)
    config = ClassifyAugmentConfig(operation_probability=1.0)
    for number in range(4):
        expected = rand_augment.apply(
            tf.constant(_view(image, number)),
            parameters=_drawn(image, number, config)["operations"],
            fill=(128, 128, 128),
        )
        np.testing.assert_array_equal(_view(image, number, config), expected)


def test_the_fill_colour_is_the_mean():
    assert preprocessing.fill_color("half") == (128, 128, 128)
    assert preprocessing.fill_color("imagenet") == (124, 116, 104)


def test_views_are_made_in_a_tf_data_graph():
    """For images of any size, with the same result as eagerly."""
    images = [_photo(4, 50, 80), _photo(5, 120, 64)]
    config = ClassifyAugmentConfig()
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(images), output_signature=tf.TensorSpec([None, None, 3], tf.uint8)
    )

    def views(number, image):
        key = tf.stack([tf.constant(1, tf.int64), number])
        return {
            "train": classify_views.training_view(
                image, key, config=config, image_size=48, normalization="half"
            ),
            "eval": classify_views.eval_view(image, image_size=48),
        }

    dataset = dataset.enumerate().map(views)
    assert {spec.shape for spec in dataset.element_spec.values()} == {(48, 48, 3)}
    for number, (image, made) in enumerate(zip(images, dataset.as_numpy_iterator(), strict=True)):
        np.testing.assert_array_equal(made["train"], _view(image, number, config, 48))
        np.testing.assert_array_equal(
            made["eval"], classify_views.eval_view(tf.constant(image), image_size=48)
        )


# ---------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def drawn() -> classify_views.Parameters:
    return _draw_many(4000, ClassifyAugmentConfig())


def test_half_are_flipped(drawn):
    assert drawn["flip"].mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    assert not _draw_many(50, ClassifyAugmentConfig(flip=False))["flip"].any()


def test_crop_and_operations_are_independent(drawn):
    top, left, height, width = drawn["box"].T.astype(float)
    crop = np.stack([top, left, height * width, width / height, drawn["flip"]])
    operations = np.concatenate([drawn["operations"][name].T for name in drawn["operations"]])
    correlation = np.corrcoef(crop, operations)[: len(crop), len(crop) :]
    assert np.abs(correlation).max() < 4.5 / math.sqrt(4000)
    flipped = np.corrcoef(crop)[-1, :-1]
    assert np.abs(flipped).max() < 4.5 / math.sqrt(4000)


def test_crops_keep_to_the_crop_scale():
    config = ClassifyAugmentConfig(min_crop_scale=0.35, max_crop_scale=0.5)
    box = _draw_many(300, config)["box"]
    area = box[:, 2] * box[:, 3] / (375 * 500)
    assert area.min() > 0.35 * 0.99
    assert area.max() < 0.5 * 1.01
    assert area.max() - area.min() > 0.1


# ---------------------------------------------------------------------------- evaluation


def _pillow_eval_view(image: np.ndarray, *, size: int, crop: float | None = None) -> np.ndarray:
    """Torchvision's Resize of the shorter side and CenterCrop."""
    picture = Image.fromarray(image)
    width, height = picture.size
    shorter = int(size / (crop or (224 / 256 if size < 384 else 1.0)))
    if width <= height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [32, 33, SIZE, 384])
@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (61, 40), (1, 1), (7, 90), (257, 256)]
)
def test_eval_views_equal_pillow(size, height, width):
    image = _photo(6, height, width)
    for crop in (None, 0.9, 1.0):
        actual = classify_views.eval_view(tf.constant(image), image_size=size, crop=crop)
        pillow = _pillow_eval_view(image, size=size, crop=crop)
        assert _difference(actual.numpy(), pillow) < TOLERANCE


def test_computing_only_the_crop_equals_cropping_the_whole():
    for height, width in ((375, 500), (801, 640), (40, 61)):
        image = _photo(7, height, width)
        shorter = 256
        if height < width:
            size = shorter, shorter * width // height
        else:
            size = shorter * height // width, shorter
        whole = tf.image.resize(image, size, method="bicubic", antialias=True)
        whole = np.clip(np.round(whole), 0, 255).astype(int)
        top, left = (round((side - SIZE) / 2) for side in size)
        actual = classify_views.eval_view(tf.constant(image), image_size=SIZE).numpy()
        difference = np.abs(actual - whole[top : top + SIZE, left : left + SIZE])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 301), (403, 256), (256, 9001)])
def test_an_image_of_the_right_size_is_only_cropped(height, width):
    image = _photo(8, height, width)
    top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
    np.testing.assert_array_equal(
        classify_views.eval_view(tf.constant(image), image_size=SIZE),
        image[top : top + SIZE, left : left + SIZE],
    )
