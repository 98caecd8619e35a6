"""Steps whose numbers are not finite are skipped and counted, or end the run, as promised."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.faults import numbers


def test_every_kind_in_one_run_that_is_cut_off(tmp_path):
    case = numbers.Case(
        faults=dict(zip((1, 2, 4, 6, 8, 9), range(len(numbers.KINDS)), strict=True)),
        limit=3,
        accumulate=2,
        cut_off=7,
    )
    numbers.check(case, tmp_path)


def test_the_kinds_are_what_they_say():
    kernel = jnp.arange(4.0)
    value = lambda nan, huge: numbers._poisoned(kernel, nan=nan, huge=huge)  # noqa: E731
    slope = lambda nan, huge: jax.grad(  # noqa: E731
        lambda kernel: numbers._poisoned(kernel, nan=nan, huge=huge)
    )(kernel)
    assert value(0.0, 0.0) == value(1.0, 0.0) == value(0.0, 1.0) == 0
    assert (slope(0.0, 0.0) == 0).all()
    assert jnp.isnan(slope(1.0, 0.0)).all()
    assert jnp.isinf(jnp.square(slope(0.0, 1.0))).all()


def test_a_run_that_does_not_skip_is_noticed(tmp_path, monkeypatch):
    """A feed without the faults that the case has."""
    case = numbers.Case(faults={3: 0}, limit=2, accumulate=1, cut_off=None)
    feed = numbers._feed
    sound = dataclasses.replace(case, faults={})
    monkeypatch.setattr(numbers, "_feed", lambda case, cut_off: feed(sound, cut_off=cut_off))
    with pytest.raises(AssertionError, match="0 skipped"):
        numbers.check(case, tmp_path)


@pytest.mark.slow
def test_cases_drawn_by_chance(tmp_path):
    row = numbers.soak(count=1, seed=1, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 1
