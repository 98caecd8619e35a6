"""A kind of mask from outside the package: one function and one row of a table."""

import numpy as np
import pytest
import tensorflow as tf

from beit_jax import jobs
from beit_jax.config import DataConfig, MaskConfig, check
from beit_jax.data import masking, pipeline, sources, views
from tests.tasks import tiny


def checkerboard(keys, *, config, grid):
    """Every other patch, starting with the first one or the second one by the image's index."""
    row, column = np.indices((grid, grid))
    even = tf.constant((row + column) % 2 == 0)
    return even[None] ^ (keys[:, 2] % 2 == 1)[:, None, None]


def check_even(config, *, grid):
    check(grid % 2 == 0, "kind", f"checkerboard needs an even grid, got {grid} x {grid}")


@pytest.fixture(autouse=True)
def checkerboard_kind(monkeypatch):
    kind = masking.MaskKind(
        draw=checkerboard, max_masked=lambda config, *, grid: grid * grid // 2, check=check_even
    )
    monkeypatch.setitem(masking.KINDS, "checkerboard", kind)


def test_a_job_accepts_the_kind():
    values = tiny.pretrain().to_dict()
    values["data"]["mask"]["kind"] = "checkerboard"
    config = jobs.parse_job(values)
    assert masking.max_masked(config.data.mask, grid=config.model.grid) == 8


def test_the_kinds_own_check_names_the_setting():
    values = tiny.pretrain().to_dict()
    values["data"]["mask"]["kind"] = "checkerboard"
    values["model"]["image_size"] = values["data"]["image_size"] = 24
    values["tokenizer"]["image_size"] = values["data"]["token_image_size"] = 12
    with pytest.raises(jobs.ConfigError, match=r"^config\.data\.mask\.kind: checkerboard needs an"):
        jobs.parse_job(values)


def test_batches_of_the_pipeline_have_such_masks():
    config = DataConfig(
        source="embedded:40",
        image_size=32,
        workers=1,
        mask=MaskConfig(kind="checkerboard"),
    )
    batches = pipeline.training_batches(
        sources.open_source(config, training=True),
        config=config,
        views=views.pretraining_views(config, grid=4, keys=("image", "mask")),
        seed=3,
        batch_size=8,
    )
    batch = next(batches)
    assert batch["image"].shape == (8, 32, 32, 3)
    pattern = np.indices((4, 4)).sum(0) % 2
    for index, mask in zip(batch["index"], batch["mask"], strict=True):
        np.testing.assert_array_equal(mask, pattern == index % 2)


def test_a_kind_that_draws_no_booleans_is_an_error(monkeypatch):
    kind = masking.MaskKind(draw=lambda keys, *, config, grid: tf.zeros([1, grid, grid]))
    monkeypatch.setitem(masking.KINDS, "numbers", kind)
    keys = tf.zeros([1, 3], tf.int64)
    with pytest.raises(TypeError, match="masks of kind 'numbers' must be bool, got float32"):
        masking.draw_masks(keys, config=MaskConfig(kind="numbers"), grid=14)
