"""Resizing against OpenCV, whose pictures the official models saw, and against exact arithmetic."""

import cv2
import numpy as np
import pytest
import torch

from beit_jax.segmentation.resize import resize_bilinear


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((36, 48), (51, 68)),
        ((70, 33), (35, 17)),  # down by about two: no antialiasing
        ((200, 150), (16, 12)),
        ((1, 9), (5, 40)),
        ((7, 1), (1, 3)),
        ((3, 3), (64, 64)),
        ((20, 31), (20, 62)),
    ],
)
def test_levels_equal_opencv_and_pytorch(old, new):
    """Within one level of OpenCV's fixed-point numbers and of the exact ones."""
    image = np.random.default_rng(0).integers(0, 256, (*old, 3)).astype(np.uint8)
    resized = resize_bilinear(image, size=new)
    assert resized.shape == (*new, 3)
    assert resized.dtype == np.uint8
    theirs = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR).reshape(*new, 3)
    assert np.abs(resized.astype(int) - theirs).max() <= 1
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None],
        new,
        mode="bilinear",
        align_corners=False,
    )[0].permute(1, 2, 0)
    assert np.abs(resized - exact.numpy()).max() < 0.8


def test_the_same_size_is_the_same_image():
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize_bilinear(image, size=(5, 8)), image)
