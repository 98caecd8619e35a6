"""The codebook as used: its figures, and patches that have the token."""

import numpy as np
import pytest

from beit_jax.pictures import tokens


def test_figures_of_a_known_distribution():
    usage = tokens.Usage(counts=np.array([2, 0, 1, 1, 0]))
    assert usage.used == 3
    assert usage.entropy == pytest.approx(1.5 * np.log(2))


def test_examples_show_the_patch_that_has_the_token():
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    ids = np.zeros((2, 3, 3), int)
    ids[1, 0, 2] = 7
    (patch,) = tokens._examples(images, ids, code=7)
    assert patch.shape == (12, 12, 3)
    assert (patch[4:8, 4:8] == images[1, 0:4, 8:12]).sum() >= 2 * 2 * 3  # within the frame
    assert (patch[4:8, 4:8][1:3, 1:3] == images[1, 1:3, 9:11]).all()
