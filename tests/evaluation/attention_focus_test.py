"""The share of attention within a class, on cases that can be worked out."""

import math

import numpy as np
import pytest

from beit_jax.evaluation.attention_focus import class_shares, mean_and_error, patch_classes

CLASSES = np.array([[[1, 1, 0], [1, 0, 0], [0, 0, -1]]])  # three on the shape, five off it


def test_uniform_attention_has_no_lift():
    shares = class_shares(np.full((1, 10, 10), 0.1), CLASSES, background=(0,))
    np.testing.assert_allclose(shares.area, 2 / 7)  # without the query and the unlabelled patch
    np.testing.assert_allclose(shares.lift(), 1)


def test_attention_on_the_shape_alone_has_the_largest_lift_there_is():
    on_shape = np.r_[0, (CLASSES[0] == 1).ravel()].astype(float)
    weights = np.tile(on_shape, (1, 10, 1))
    np.testing.assert_allclose(class_shares(weights, CLASSES, background=(0,)).lift(), 7 / 2)
    # Background asks too: its four other patches get nothing.
    both = class_shares(weights, CLASSES)
    np.testing.assert_allclose(both.attention, 3 / 8)
    np.testing.assert_allclose(both.area, (3 * 2 + 5 * 4) / 7 / 8)


def test_looking_at_oneself_and_at_the_class_token_counts_for_nothing():
    weights = np.full((1, 10, 10), 0.01) + 5 * np.eye(10)
    weights[:, :, 0] = 3
    np.testing.assert_allclose(class_shares(weights, CLASSES, background=(0,)).lift(), 1)


def test_images_without_an_object_are_left_out_of_the_mean():
    weights = np.full((2, 10, 10), 0.1)
    shares = class_shares(weights, np.concatenate([CLASSES, 0 * CLASSES]), background=(0,))
    assert np.isnan(shares.lift()).tolist() == [False, True]
    assert mean_and_error(shares.lift())[2] == 1
    assert math.isnan(mean_and_error(np.array([np.nan]))[0])
    np.testing.assert_allclose(mean_and_error(np.array([1.0, 3.0, np.nan]))[:2], (2, 1))


def test_a_patch_has_the_class_of_most_of_its_pixels():
    labels = np.array([[[7, 7, 255, 255], [7, 2, 255, 3], [1, 2, 4, 4], [3, 5, 4, 255]]], np.uint8)
    assert patch_classes(labels, grid=2, ignore=255).tolist() == [[[7, -1], [-1, 4]]]
    assert patch_classes(labels, grid=2, ignore=None).tolist() == [[[7, 255], [-1, 4]]]


def test_classes_of_another_grid_are_an_error():
    with pytest.raises(ValueError, match=r"must be \(1, 3, 3\)"):
        class_shares(np.ones((1, 10, 10)), np.zeros((1, 2, 2), int))
