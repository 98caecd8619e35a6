"""Segmentation's views equal mmseg's steps at fixed draws, and maps stay on their images."""

import functools

import cv2
import numpy as np
import pytest
import tensorflow as tf

from beit_jax.config import SegmentAugmentConfig, SegmentDataConfig
from beit_jax.data import pipeline, segment_views, sources, views
from beit_jax.data.sources import embedded

SIDE = 64
# Heights and widths: usual, large, smaller than the crop, an aspect above 4 both ways, one pixel.
SIZES = [(90, 120), (333, 250), (20, 30), (40, 250), (300, 33), (77, 1), (1, 1), (64, 64)]
PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


@functools.cache  # a function is traced for each
def _config(side: int = SIDE, **augment) -> SegmentDataConfig:
    return SegmentDataConfig(
        source="embedded", image_size=side, augment=SegmentAugmentConfig(**augment)
    )


def _key(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def _noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def _blobs(height: int, width: int, *, classes: int = 5, seed: int = 0) -> np.ndarray:
    """A map in which one class has most, with a ring of ignored pixels."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for number in range(1, classes):
        centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.3)
        distance = np.hypot(y - centre[0], x - centre[1])
        labels[distance < radius] = number
        labels[np.abs(distance - radius) < 0.02] = 255
    return labels


# ---------------------------------------------------------------------------- size


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sizes_are_mmcvs(height, width):
    config = SegmentDataConfig(source="embedded", image_size=512)
    for scale in (0.5, 0.777, 1.0, 1.9999, 2.0):
        size = segment_views.scaled_size(
            tf.constant([height, width]), scale=tf.constant(scale, tf.float64), config=config
        )
        longer, shorter = int(2048 * scale), int(512 * scale)
        factor = min(longer / max(height, width), shorter / min(height, width))
        expected = [max(1, int(side * factor + 0.5)) for side in (height, width)]
        assert size.numpy().tolist() == expected


# ---------------------------------------------------------------------------- resizing


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.37, 2.0])
def test_a_box_of_the_resized_image_and_map_is_opencvs(height, width, factor):
    image, labels = _noise(height, width), _noise(height, width, seed=1)[..., 0]
    new = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    top, left = new[0] // 3, new[1] // 4
    box = tf.constant([top, left, max(1, new[0] // 2), max(1, new[1] // 2)])
    inside = np.s_[top : top + int(box[2]), left : left + int(box[3])]

    ours = segment_views.resize_box(tf.constant(image), box=box, size=tf.constant(new)).numpy()
    official = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)[inside]
    differences = np.abs(ours.astype(int) - official)
    # OpenCV drops bits between its two passes, a quarter of a level on average.
    assert differences.max() <= 1
    assert differences.mean() < 0.2

    nearest = segment_views._nearest(tf.constant(labels), box=box, size=tf.constant(new)).numpy()
    official = cv2.resize(labels, new[::-1], interpolation=cv2.INTER_NEAREST)[inside]
    np.testing.assert_array_equal(nearest, official)


# ---------------------------------------------------------------------------- crop


def _official_crop(labels: np.ndarray, corners: np.ndarray, size: list[int], share: float):
    """Which of the draws mmseg's RandomCrop takes, with the whole map resized first."""
    resized = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    room = np.maximum(np.array(size) - SIDE, 0)
    for number, corner in enumerate(corners):
        top, left = np.floor(corner * (room + 1)).astype(int)
        crop = resized[top : top + SIDE, left : left + SIDE]
        found, counts = np.unique(crop, return_counts=True)
        counts = counts[found != 255]
        if number == 10 or (len(counts) > 1 and counts.max() / counts.sum() < share):
            return number, [top, left, *crop.shape], crop
    raise AssertionError


@pytest.mark.parametrize("share", [0.75, 1.0])
def test_the_crop_is_mmsegs(share):
    """The first draw of which no class has more, or the eleventh."""
    taken = set()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.uint8),
            tf.TensorSpec([2], tf.int32),
            tf.TensorSpec([11, 2], tf.float64),
        ]
    )
    def choose(labels, size, corners):
        return segment_views.choose_crop(
            labels, size=size, corners=corners, side=SIDE, max_class_share=share
        )

    for seed in range(40):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(30, 300, 2).tolist()
        labels = _blobs(height, width, classes=3 + seed % 4, seed=seed)
        size = [max(1, int(side * rng.uniform(0.5, 2))) for side in (height, width)]
        corners = rng.random((11, 2))
        box, crop = choose(labels, size, corners)
        number, expected_box, expected = _official_crop(labels, corners, size, min(share, 0.9999))
        if share == 1:
            number, expected_box, expected = _official_crop(labels, corners[[0] * 11], size, 0)
            number = 0
        assert box.numpy().tolist() == expected_box
        np.testing.assert_array_equal(crop, expected)
        taken.add(number)
    assert taken == {0} if share == 1 else {0, 1, 10} <= taken


def test_crops_reach_every_corner():
    """Offsets are uniform over 0..size - crop, both ends included."""
    labels = tf.zeros([6, 5], tf.uint8)
    choose = functools.partial(
        segment_views.choose_crop, labels, size=tf.constant([6, 5]), side=4, max_class_share=1.0
    )
    ends = np.array([[0, 0], [1 - 1e-12, 1 - 1e-12], [0.34, 0.51]])
    boxes = [choose(corners=tf.constant(end[None]))[0].numpy().tolist() for end in ends]
    assert boxes == [[0, 0, 4, 4], [2, 1, 4, 4], [1, 1, 4, 4]]


# ---------------------------------------------------------------------------- the whole view


def _view(image: np.ndarray, labels: np.ndarray, number: int, config) -> dict[str, np.ndarray]:
    made = segment_views.training_view(
        tf.constant(image), tf.constant(labels), _key(number), config=config
    )
    return {name: value.numpy() for name, value in made.items()}


def test_a_map_stays_on_its_image_to_the_pixel():
    """An image that is its own map, in blocks: away from their edges both agree everywhere."""
    config = _config(**PLAIN)
    blocks = np.random.default_rng(0).integers(0, 200, (5, 6)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((30, 30), np.uint8))
    compared = flips = 0
    for number in range(24):
        made = _view(np.repeat(labels[..., None], 3, 2), labels, number, config)
        height, width = made["size"]
        crop = made["segmentation"][:height, :width].astype(int)
        image = made["image"][:height, :width, 0].astype(int)
        # A block's inside: what is two pixels from any other block, and from the crop's edge.
        map_ = made["segmentation"][:height, :width]
        square = np.ones((5, 5))
        inside = (cv2.dilate(map_, square) == cv2.erode(map_, square))[2:-2, 2:-2]
        image, crop = image[2:-2, 2:-2], crop[2:-2, 2:-2]
        np.testing.assert_array_equal(image[inside], crop[inside])
        compared += inside.sum()
        flips += bool(segment_views.draw_parameters(_key(number), config=config)["flip"])
    assert compared > 24 * SIDE * SIDE / 8
    assert 4 < flips < 20


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_views_equal_the_official_steps_at_fixed_draws(height, width):
    """All of them, with OpenCV's resizing, for any size of image."""
    config = _config(**PLAIN)
    image, labels = _noise(height, width), _blobs(height, width)
    for number in range(3):
        drawn = segment_views.draw_parameters(_key(number), config=config)
        scale = float(drawn["scale"])
        factor = min(
            int(4 * SIDE * scale) / max(height, width), int(SIDE * scale) / min(height, width)
        )
        size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
        _, (top, left, *extent), crop = _official_crop(labels, drawn["corners"].numpy(), size, 0.75)
        picture = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        picture = picture[top : top + SIDE, left : left + SIDE]
        if drawn["flip"]:
            picture, crop = picture[:, ::-1], crop[:, ::-1]
        below, beside = SIDE - extent[0], SIDE - extent[1]
        made = _view(image, labels, number, config)
        assert made["size"].tolist() == extent
        expected = np.pad(crop, [(0, below), (0, beside)], constant_values=255)
        np.testing.assert_array_equal(made["segmentation"], expected)
        expected = np.pad(picture, [(0, below), (0, beside), (0, 0)])
        assert np.abs(made["image"].astype(int) - expected).max() <= 1


def test_draws_fill_their_ranges():
    config = _config()
    keys = tf.data.Dataset.range(2000).map(lambda i: tf.stack([tf.constant(3, tf.int64), i]))
    drawn = keys.map(lambda key: segment_views.draw_parameters(key, config=config)).batch(2000)
    drawn = next(drawn.as_numpy_iterator())
    assert 0.5 <= drawn["scale"].min() < 0.51
    assert 1.99 < drawn["scale"].max() <= 2
    assert abs(drawn["scale"].mean() - 1.25) < 0.03
    assert abs(drawn["flip"].mean() - 0.5) < 0.04
    corners = drawn["corners"].reshape(2000, -1)
    assert corners.shape[1] == 22
    assert (np.abs(corners.mean(0) - 0.5) < 0.03).all()
    numbers = np.column_stack([drawn["scale"], drawn["flip"], corners])
    assert (np.abs(np.corrcoef(numbers.T) - np.eye(24)) < 0.1).all()


# ---------------------------------------------------------------------------- in the pipeline


@functools.cache
def _embedded() -> tuple[SegmentDataConfig, sources.Source]:
    config = SegmentDataConfig(source="embedded:40", holdout=3, image_size=SIDE, workers=1)
    return config, sources.open_source(config, training=True)


def _batches(**settings):
    config, source = _embedded()
    made = views.segmentation_views(config, classes=11)
    return pipeline.training_batches(source, config=config, views=made, batch_size=8, **settings)


@pytest.mark.slow
def test_a_batch_is_a_function_of_seed_and_step():
    stream = _batches(seed=1)
    first, second = next(stream), next(stream)
    assert first["image"].shape == (8, SIDE, SIDE, 3)
    assert first["image"].dtype == np.uint8
    assert first["segmentation"].shape == (8, SIDE, SIDE)
    assert first["segmentation"].dtype == np.uint8
    assert first["size"].dtype == np.int32
    # The embedded set's own names are those of its classes.
    assert _embedded()[1].segmentation_classes == ("background", *embedded.SHAPES)
    assert set(np.unique(first["segmentation"]).tolist()) <= {*range(11), 255}
    resumed_half = next(_batches(seed=1, start_step=1, shard=1, shards=2))
    for name in ("image", "segmentation", "size"):
        np.testing.assert_array_equal(resumed_half[name], second[name][4:])
        assert name == "size" or not np.array_equal(first[name], second[name])


def test_a_view_differs_by_its_key():
    image, labels = _noise(90, 120), _blobs(90, 120)
    one, same, other = (_view(image, labels, number, _config()) for number in (1, 1, 2))
    np.testing.assert_array_equal(one["image"], same["image"])
    assert not np.array_equal(one["image"], other["image"])
