"""Features of an encoder's blocks against NumPy, and what loading an encoder leaves out."""

import functools

import jax
import numpy as np
import pytest

from beit_jax.config import ConfigError
from beit_jax.evaluation import features
from beit_jax.preprocessing import normalize
from beit_jax.weights import native
from tests.evaluation.examples import compiled_features


@pytest.mark.slow
def test_features_equal_means_of_raw_block_outputs(frozen, monkeypatch):
    """Blocks are counted from 1; images go through whole, or in parts of one image per device."""
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    hidden_states = functools.partial(frozen.functions.apply, method="hidden_states")
    states = np.asarray(jax.jit(hidden_states)(frozen.params, images), np.float64)
    for at_once, kind in ((features.IMAGES_AT_ONCE, "mean"), (1, "cls_mean")):
        monkeypatch.setattr(features, "IMAGES_AT_ONCE", at_once)
        pooled = np.asarray(compiled_features(frozen, images, blocks=(3, 1), kind=kind))
        for i, block in enumerate((3, 1)):
            for image in range(16):
                tokens = states[block, image]
                expected = tokens[1:].mean(axis=0)
                if kind == "cls_mean":
                    expected = np.concatenate([tokens[0], expected])
                np.testing.assert_allclose(pooled[image, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_uint8_images_are_normalised_first_and_erased_only_with_a_key(frozen):
    images = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    spec = features.FeatureSpec(blocks=(2,), normalization="imagenet", erase_probability=1.0)
    compute = jax.jit(
        functools.partial(features.image_features, frozen.functions, frozen.params, spec=spec)
    )
    pixels = normalize(images, kind="imagenet")
    expected = compiled_features(frozen, pixels, blocks=(2,), kind="mean")
    np.testing.assert_allclose(compute(images), expected, rtol=1e-4, atol=1e-5)
    erased = compute(images, key=jax.random.key(0))
    assert not np.allclose(erased, expected, rtol=1e-2, atol=1e-2)


def test_the_mask_token_and_the_final_norm_are_left_out(encoder, frozen):
    assert {"mask_token", "norm"} & set(frozen.params) == set()
    stored = native.read_params(encoder)["encoder"]
    np.testing.assert_array_equal(frozen.params["cls_token"], stored["cls_token"])
    assert set(stored) - set(frozen.params) == {"mask_token", "norm"}


def test_positions_are_resized_to_the_images(encoder):
    frozen = features.load_frozen_encoder(encoder, image_size=48)
    assert frozen.model.grid == 6
    images = np.zeros((2, 48, 48, 3), np.float32)
    pooled = compiled_features(frozen, images, blocks=(1,), kind="mean")
    assert pooled.shape == (2, 1, 32)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ConfigError, match="features: must be one of mean, cls_mean"):
        features.FeatureSpec(blocks=(1,), kind="max")
