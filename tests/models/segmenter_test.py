"""The segmenter against `transformers`, its initialisation, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from beit_jax.config import SegmentHeadConfig
from beit_jax.models.segmentation_heads import logits_side
from beit_jax.models.segmenter import segmenter
from tests.models import upernet_peer
from tests.tiny import PER_BLOCK

# Five patches: no pooling bin is a whole number of them, and max pooling leaves a row out.
MODEL = dataclasses.replace(
    PER_BLOCK, layers=4, width=16, heads=2, mlp_width=32, image_size=20, patch_size=4
)
HEAD = SegmentHeadConfig(blocks=(1, 2, 3, 4), channels=12, auxiliary_channels=8)
CLASSES = 5


def images(config, batch=2):
    shape = (batch, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def parity(peer, config, *, head, classes, pixels):
    """The largest relative error of both heads' logits with the peer's weights."""
    params, variables = upernet_peer.to_segmenter(
        peer.state_dict(), head=head, layers=config.layers
    )
    model = segmenter(config, head=head, classes=classes)
    assert upernet_peer.same_layout(params, model.shapes())
    assert upernet_peer.same_layout(variables, model.variables_shapes())
    expected = upernet_peer.both_logits(peer, pixels)
    actual = jax.jit(
        lambda params, variables, pixels: model.apply(
            params, pixels, variables=variables, method="with_auxiliary"
        )
    )(params, variables, pixels)
    side = logits_side(config, head)
    assert actual[0].shape == (len(pixels), side, side, classes)
    return max(relative_error(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("change", [{}, {"auxiliary_convs": 2, "auxiliary_concat": True}])
def test_both_logits_are_those_of_the_official_graph(change):
    head = dataclasses.replace(HEAD, **change)
    peer = upernet_peer.upernet(MODEL, head=head, classes=CLASSES)
    assert parity(peer, MODEL, head=head, classes=CLASSES, pixels=images(MODEL)) < 1e-4
