"""Small checkpoints of every kind, with random parameters."""

import dataclasses
import pathlib

import numpy as np

from beit_jax.models.functional import unflatten
from beit_jax.weights import native
from beit_jax.weights.description import Description, to_config
from tests import tiny

TINY = dataclasses.replace(tiny.TINY, image_size=40)
PLAIN = dataclasses.replace(tiny.PLAIN, image_size=40)
PER_BLOCK = dataclasses.replace(tiny.PER_BLOCK, image_size=40)
# 384 pixels, as published: 24 × 24 patches.
LARGE_IMAGE = dataclasses.replace(PER_BLOCK, image_size=384, patch_size=16, layers=2)

PRETRAINED = {
    "beit+": Description(task="pretrain", model=TINY, outputs=40),
    "plain": Description(task="pretrain", model=PLAIN, outputs=40, normalization="imagenet"),
}
FINE_TUNED = {
    "mean": Description(task="classify", model=PER_BLOCK, outputs=5),
    "cls": Description(task="classify", model=PER_BLOCK, outputs=5, pooling="cls"),
    "plain": Description(task="classify", model=PLAIN, outputs=5),
    "384": Description(task="classify", model=LARGE_IMAGE, outputs=7),
}
EVERY = {f"pretrained {k}": v for k, v in PRETRAINED.items()} | {
    f"fine-tuned {k}": v for k, v in FINE_TUNED.items()
}


def random_params(description: Description, seed: int = 0) -> dict[str, np.ndarray]:
    """Flat parameters that give logits of size ~1; scales are near 1, and nothing is zero."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, leaf in description.shapes().items():
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith(("scale", "gamma_1", "gamma_2")):
            noise = 1 + 0.2 * noise
        elif name.endswith("kernel"):
            noise = noise * 0.5 / description.model.width**0.5
        elif name.endswith("bias"):
            noise = 0.1 * noise
        else:
            noise = 0.5 * noise
        params[name] = noise.astype(np.float32)
    return params


def saved(path: pathlib.Path, description: Description, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a native checkpoint; returns its flat parameters."""
    params = random_params(description, seed)
    native.write_params(str(path), unflatten(params), config=to_config(description))
    return params


def images(description: Description, count: int = 2) -> np.ndarray:
    """Normalised images, float32 `[count, s, s, 3]`."""
    size = description.model.image_size
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def relative_error(actual, expected) -> float:
    """Largest difference over the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
