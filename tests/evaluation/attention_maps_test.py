"""Maps of attention weights, against loops and known answers."""

import numpy as np
import pytest

from beit_jax.evaluation.attention_maps import (
    pca_colours,
    query_map,
    rollout,
    threshold_mask,
    to_pixels,
)


def random_weights(*shape: int) -> np.ndarray:
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_equals_a_loop_over_images_and_blocks():
    weights = random_weights(3, 2, 4, 5, 5)
    found = rollout(weights)
    for image in range(2):
        expected = np.eye(5)
        for block in range(3):
            mixed = sum(weights[block, image, head] for head in range(4)) / 4
            expected = (0.5 * mixed + 0.5 * np.eye(5)) @ expected
        np.testing.assert_allclose(found[image], expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2, 1)])
def test_a_map_lights_up_exactly_the_pixels_of_the_patch_attended_to(key):
    weights = np.zeros((1, 2, 10, 10))
    weights[..., 1 + 1 * 3 + 0, 1 + key[0] * 3 + key[1]] = 1  # patch (1, 0) attends to `key`
    pixels = to_pixels(query_map(weights, query=(1, 0)), image_size=24)
    expected = np.zeros((24, 24))
    expected[8 * key[0] : 8 * key[0] + 8, 8 * key[1] : 8 * key[1] + 8] = 1
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (1, 2, 24, 24)))
    assert not query_map(weights, query=None).any()


def test_the_class_token_attends_by_the_first_row():
    weights = random_weights(2, 5, 5)
    expected = weights[:, 0, 1:].reshape(2, 2, 2)
    np.testing.assert_allclose(query_map(weights, query=None), expected, rtol=1e-6)


def test_what_is_no_patch_is_an_error():
    with pytest.raises(ValueError, match=r"no patch \(2, 0\) among 2 × 2"):
        query_map(random_weights(1, 5, 5), query=(2, 0))
    with pytest.raises(ValueError, match="not of 1"):
        query_map(random_weights(1, 6, 6), query=None)


def test_a_threshold_mask_is_the_smallest_set_with_the_share():
    attention = np.array([[[0.1, 0.4], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]]])
    assert threshold_mask(attention, share=0.6)[0].tolist() == [[False, True], [True, False]]
    assert threshold_mask(attention, share=0.66)[0].tolist() == [[False, True], [True, True]]
    assert threshold_mask(attention, share=0.3)[0].tolist() == [[False, True], [False, False]]
    assert threshold_mask(attention).sum(axis=(1, 2)).tolist() == [2, 1]


def test_colours_separate_what_features_separate():
    rng = np.random.default_rng(0)
    kinds = rng.integers(2, size=(3, 4, 4))
    features = np.array([[5.0, 0, 0, 1, 0], [-5.0, 0, 0, 1, 0]])[kinds]
    colours = pca_colours(features + 1e-9 * rng.standard_normal(features.shape))
    assert colours.shape == (3, 4, 4, 3)
    assert colours.dtype == np.uint8
    assert set(colours[kinds == 0][:, 0].tolist()) == {255}
    assert set(colours[kinds == 1][:, 0].tolist()) == {0}
    assert (colours[..., 1:] == 128).all()  # nothing else varies
    assert (pca_colours(np.ones((1, 2, 2, 2))) == 128).all()
