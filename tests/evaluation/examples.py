"""A small encoder with random weights, as every test of the evaluation uses it."""

import dataclasses
import functools

import jax

from beit_jax.evaluation import features
from beit_jax.models.heads import masked_image_model
from beit_jax.weights import native
from beit_jax.weights.description import Description, to_config
from tests.tiny import TINY

MODEL = dataclasses.replace(TINY, heads=2, image_size=32, drop_path_rate=0.1)
CLASSES = 10


def write_encoder(path: str) -> str:
    """Writes a checkpoint of a pre-training run with random weights, and returns its path.

    The weights are larger than at the start of training, where all images have nearly the same
    features.
    """
    params = jax.jit(masked_image_model(MODEL, vocabulary=16).init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    native.write_params(
        path, params, config=to_config(Description(task="pretrain", model=MODEL, outputs=16))
    )
    return path


def compiled_features(frozen: features.FrozenEncoder, images, **settings):
    """`block_features`, compiled."""
    function = functools.partial(features.block_features, frozen.functions, **settings)
    return jax.jit(function)(frozen.params, images)
