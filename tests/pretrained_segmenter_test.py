"""A loaded segmenter: logits of images that fit, class maps of images of any size."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.config import to_dict
from beit_jax.config.segment import InferenceConfig
from beit_jax.models.functional import unflatten
from beit_jax.models.segmenter import segmenter
from beit_jax.preprocessing import normalize
from beit_jax.weights import native
from beit_jax.weights.description import to_config
from tests.weights import examples
from tests.weights.segmenter_test import HEAD, MODEL, SEGMENTER, numbers, saved

SIDE = MODEL.image_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenter") / "native"
    saved(path, SEGMENTER)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return beit_jax.load_segmenter(folder, dtype="float32")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (SIDE + 20, SIDE + 50, 3), dtype=np.uint8)


def test_logits_are_the_model_s_with_running_statistics(loaded, image):
    params, variables = SEGMENTER.split(numbers(SEGMENTER))
    model = segmenter(MODEL, head=HEAD, classes=3)
    images = np.stack([image[:SIDE, :SIDE], image[-SIDE:, -SIDE:]])
    expected = jax.jit(model.apply)(
        unflatten(params), normalize(images, kind="imagenet"), variables=unflatten(variables)
    )
    found = loaded.logits(images)
    assert found.shape == (2, 12, 12, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert loaded.classes == ("road", "sky", "tree")
    assert loaded.encoder.image_size == SIDE
    with pytest.raises(ValueError, match="68 × 98, but this model takes 48 × 48"):
        loaded.logits(image[None])


@pytest.mark.slow
def test_a_window_s_map_is_its_enlarged_logits_largest(loaded, image):
    window = image[:SIDE, :SIDE]
    logits = jax.image.resize(loaded.logits(window[None]), (1, SIDE, SIDE, 3), "linear")
    classes = loaded.segment(window)
    assert classes.dtype == np.uint8
    assert (classes == np.asarray(logits[0].argmax(-1))).mean() > 0.999


@pytest.mark.slow
def test_any_size_any_batch_gives_the_same_map(loaded, image):
    small = image[:10, :33]
    one, two = loaded.segment_batch([image, small])
    assert loaded.segment_batch([]) == []
    with pytest.raises(beit_jax.ConfigError, match="2 are more than batch, 1"):
        loaded.segment_batch([image, small], batch=1)
    assert one.shape == image.shape[:2]
    assert two.shape == small.shape[:2]
    assert (loaded.segment(image) == one).mean() > 0.999
    assert len(np.unique(one)) > 1
    several = loaded.segment(image, scales=(0.5, 1.0), flip=True, stride=40)
    assert several.shape == one.shape
    assert (several != one).any()
    with pytest.raises(beit_jax.ConfigError, match="stride: 49 leaves gaps between windows of 48"):
        loaded.segment(image, stride=49)
    with pytest.raises(beit_jax.ConfigError, match="uint8"):
        loaded.segment(image[..., 0])
    for other in (Image.fromarray(image), "photo.jpg", image.tolist()):
        with pytest.raises(beit_jax.ConfigError, match=r"must be a uint8 array \[h, w, 3\], not"):
            loaded.segment(other)


@pytest.mark.slow
def test_a_run_s_own_evaluation_is_the_default_and_follows_the_size(tmp_path):
    params, variables = map(unflatten, SEGMENTER.split(numbers(SEGMENTER)))
    own = InferenceConfig(stride=24, scales=(1.0, 1.5), flip=True, tile=64)
    config = to_config(SEGMENTER) | {"inference": to_dict(own)}
    config["data"] |= {"short_side": 60, "long_side": 0}
    native.write_params(str(tmp_path / "run"), params, config=config, variables=variables)
    found = beit_jax.load_segmenter(tmp_path / "run")
    assert found.inference == own
    assert (found.short_side, found.long_side) == (60, 240)
    larger = beit_jax.load_segmenter(tmp_path / "run", image_size=2 * SIDE)
    assert larger.inference == dataclasses.replace(own, stride=48)
    assert (larger.short_side, larger.long_side) == (120, 480)
    assert larger.logits(np.zeros((1, 96, 96, 3), np.uint8)).shape == (1, 24, 24, 3)


def test_other_checkpoints_are_refused_and_the_encoder_loads(folder, tmp_path):
    examples.saved(tmp_path / "classifier", examples.FINE_TUNED["mean"])
    with pytest.raises(beit_jax.WeightsError, match="no segmentation model; it is a classifier"):
        beit_jax.load_segmenter(tmp_path / "classifier")
    with pytest.raises(beit_jax.WeightsError, match="no classifier; it is a segmentation model"):
        beit_jax.load_classifier(folder)
    encoder = beit_jax.load_encoder(folder)
    assert not encoder.final_norm
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert encoder.blocks(images, (6,))[0].patches.shape == (1, 3, 3, 16)
