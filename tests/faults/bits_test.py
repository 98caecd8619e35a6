"""A flipped bit is noticed, or what is read is what was written."""

import random

import pytest

from beit_jax.weights import digests
from tests.faults import bits


@pytest.mark.slow
def test_some_bits(tmp_path):
    row = bits.soak(count=20, seed=1, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 20
    assert "noticed" in row.note


@pytest.mark.slow
def test_many_bits(tmp_path):
    row = bits.soak(count=60, seed=2, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 60


@pytest.mark.slow
def test_without_digests_other_numbers_are_read(monkeypatch, tmp_path):
    """What the soak is for: Orbax alone restores them without a word."""
    monkeypatch.setattr(digests, "arrays_problem", lambda *_, **__: "")
    row = bits.soak(count=60, seed=3, folder=tmp_path)
    assert any("other numbers: without a word" in failure for failure in row.failures)
    assert row.survived == row.tried - len(row.failures)


def test_one_bit_is_flipped_and_the_flip_repeats(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(range(200)))
        place = bits.flip(tmp_path / name, "*", random.Random(1))
        contents.append((tmp_path / name / "file").read_bytes())
    assert place.startswith("file, byte")
    assert contents[0] == contents[1]
    changed = [a ^ b for a, b in zip(contents[0], bytes(range(200)), strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0].bit_count() == 1
