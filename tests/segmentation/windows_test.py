"""Sizes and windows by mmseg's rules; tiles back to the whole; rooms; errors of one line."""

import itertools

import numpy as np
import pytest

from beit_jax.config import ConfigError
from beit_jax.config.segment import InferenceConfig
from beit_jax.segmentation import windows

CROP, TILE = 24, 16
SLIDE = InferenceConfig(stride=10, tile=TILE)


def image(height, width):
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "expected", "settings"),
    [
        ((512, 683), (512, 683), {}),
        ((683, 512), (683, 512), {}),
        ((256, 341), (512, 682), {}),
        ((1000, 1500), (512, 768), {}),
        ((300, 2000), (307, 2048), {}),  # aspect over 4: the longer side is the limit
        ((1, 9000), (1, 2048), {}),  # int(0.23 + 0.5) would be no row at all
        ((300, 2000), (512, 3413), {"fill_window": True}),
        ((1000, 1500), (256, 384), {"scales": (0.5,)}),
        ((1000, 1500), (512, 768), {"scales": (0.5,), "fill_window": True}),
        ((1000, 1500), (896, 1344), {"scales": (1.75,), "fill_window": True}),
        ((300, 2000), (512, 512), {"mode": "whole"}),
    ],
)
def test_images_keep_their_shape_within_both_limits(size, expected, settings):
    config = InferenceConfig(**settings)
    found = windows.resized_sizes(size, config=config, crop=512, shorter=512, longer=2048)
    assert found == [expected]


@pytest.mark.parametrize(
    ("side", "expected"),
    [(512, [0]), (300, [0]), (513, [0, 1]), (683, [0, 171]), (853, [0, 341]), (854, [0, 341, 342])],
)
def test_the_last_window_is_shifted_back(side, expected):
    assert windows.starts(side, crop=512, stride=341) == expected


def test_every_pixel_counts_once_in_every_pass():
    """The shares of the windows that have a pixel sum to one, however many there are."""
    config = InferenceConfig(stride=7, scales=(0.4, 1.0, 1.6), flip=True)
    prepared = windows.prepare_image(image(30, 47), config=config, crop=CROP)
    assert windows.passes(config) == 6
    assert [window.index for window in prepared.windows] == sorted(
        window.index for window in prepared.windows
    )
    for index in range(6):
        own = [i for i, window in enumerate(prepared.windows) if window.index == index]
        height, width = prepared.windows[own[0]].resized
        total = np.zeros((height + CROP, width + CROP))
        for i in own:
            top, left = prepared.windows[i].corner
            rows, columns = prepared.shares[i]
            total[top : top + CROP, left : left + CROP] += np.outer(rows, columns)
        np.testing.assert_allclose(total[:height, :width], 1, atol=1e-6)
        assert not total[height:].any()
        assert not total[:, width:].any()


def test_tiles_make_up_the_whole_again():
    labels = np.random.default_rng(0).integers(0, 256, (37, 50)).astype(np.uint8)
    prepared = windows.prepare_image(image(37, 50), config=SLIDE, crop=CROP)
    rooms = windows.Rooms(tile=TILE)
    batch = windows.pack([prepared], [labels], images=2, crop=CROP, rooms=rooms)
    np.testing.assert_array_equal(windows.assemble(batch["labels"][0], size=(37, 50)), labels)
    assert (batch["labels"][1] == 255).all()
    assert batch["tile_count"].tolist() == [12, 0]
    unlabelled = windows.pack([prepared], [None], images=1, crop=CROP, rooms=rooms)
    assert (unlabelled["labels"] == 255).all()
    assert "labels" not in windows.pack([prepared], images=1, crop=CROP, rooms=rooms)


def test_a_tile_is_reached_by_the_windows_over_it():
    config = InferenceConfig(stride=24, flip=True, tile=24)
    prepared = windows.prepare_image(image(24, 48), config=config, crop=24)
    rooms = windows.Rooms(tile=24)
    batch = windows.pack([prepared], images=1, crop=24, rooms=rooms)
    counts = batch["reaching_count"][0].tolist()
    reaching = [batch["reaching"][0, t, :count].tolist() for t, count in enumerate(counts)]
    # Mirrored, the right tile is under the first window.
    assert reaching == [[0, 3], [1, 2]]
    assert batch["closes"][0, :, :2].all()


def test_rooms_grow_by_powers_of_two_and_never_shrink():
    asked = []

    def agree(needed):
        asked.append(needed)
        return [max(needed[0], 3), needed[1]]

    rooms = windows.Rooms(tile=TILE, agree=agree)
    small, large = (
        windows.prepare_image(image(*size), config=SLIDE, crop=CROP)
        for size in ((24, 24), (24, 94))
    )
    assert rooms.grow([small]) == (4, 4)
    assert rooms.grow([small, large]) == (8, 16)
    assert rooms.grow([]) == (8, 16)
    assert asked == [[1, 4], [8, 12], [1, 1]]
    batch = windows.pack([], [], images=2, crop=CROP, rooms=rooms)
    assert batch["windows"].shape == (2, 8, CROP, CROP, 3)
    assert not batch["window_count"].any()
    assert (batch["labels"] == 255).all()


def packed(labels):
    prepared = windows.prepare_image(image(9, 9), config=SLIDE, crop=CROP)
    rooms = windows.Rooms(tile=TILE)
    return windows.pack([prepared], [labels], images=1, crop=CROP, rooms=rooms)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windows.check_windows(SLIDE, crop=8), "stride: 10 leaves gaps between windows"),
        (
            lambda: windows.check_windows(InferenceConfig(mode="whole", scales=(2.0,)), crop=8),
            "scales: mode 'whole' has one window",
        ),
        (
            lambda: windows.prepare_image(np.zeros((4, 4), np.uint8), config=SLIDE, crop=CROP),
            "image: must be uint8 [h, w, 3], not uint8 (4, 4)",
        ),
        (
            lambda: windows.prepare_image(
                image(1, 65_000), config=InferenceConfig(stride=10, fill_window=True), crop=CROP
            ),
            "image: (1, 65000) is too large for size (24, 1560000)",
        ),
        (
            lambda: packed(np.zeros((9, 8), np.uint8)),
            "labels: must be uint8 (9, 9) as the image is, not uint8 (9, 8)",
        ),
        (
            lambda: packed(np.zeros((9, 9), int)),
            "labels: must be uint8 (9, 9) as the image is, not int64 (9, 9)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_line(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_stride_and_whole_images_have_nothing_to_do_with_each_other():
    config = InferenceConfig(mode="whole", stride=500)
    for size in itertools.product((5, 60), repeat=2):
        assert len(windows.prepare_image(image(*size), config=config, crop=CROP).windows) == 1
