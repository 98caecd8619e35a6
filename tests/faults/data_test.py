"""Whole and damaged image files give Pillow's pixels or the error that is counted."""

import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.data import decode
from tests.faults import data


def test_a_hundred_files(tmp_path):
    row = data.soak(count=100, seed=1, folder=tmp_path)
    assert row.tried >= 100
    assert row.failures == ()
    assert row.survived == row.tried
    assert "the same" in row.note
    assert "refused by both" in row.note


def test_other_pixels_are_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "decode_image", lambda data, **_: tf.zeros([80, 60, 3], tf.uint8))
    row = data.soak(count=3, seed=1, folder=tmp_path)
    assert row.survived == 0
    assert all("differs: (80, 60, 3) instead of" in failure for failure in row.failures)


def test_damage_is_drawn_and_repeats():
    first, again = (list(itertools.islice(data.files(5), 30)) for _ in range(2))
    assert first == again
    assert len({content for _, content in first}) == 30


@pytest.mark.parametrize(("value", "expected"), [(0x12FF, 0x12), (0xFFFF, 0xFF)])
def test_the_high_byte_is_the_rule_for_16_bits(value, expected):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(file, "PNG")
    wanted = data.by_pillow(file.getvalue())
    assert wanted is not None
    assert (wanted == expected).all()
    assert data.comparison()(file.getvalue()) == "the same"
