"""Thinning keeps what one looks for in a curve."""

import numpy as np

from beit_jax.report.series import MOST, Series, thinned


def test_extremes_ends_and_breaks_stay():
    count = 100_000
    values: list[float | None] = list(np.random.default_rng(0).normal(size=count))
    values[12_345], values[54_321], values[77_777] = 100.0, -100.0, None
    series = Series(steps=tuple(range(count)), values=tuple(values))
    thin = thinned(series)
    assert len(thin.steps) <= MOST + 2
    assert list(thin.steps) == sorted(thin.steps)
    kept = dict(zip(thin.steps, thin.values, strict=True))
    assert all(values[step] == value for step, value in kept.items())
    assert {0, count - 1, 12_345, 54_321, 77_777} <= set(kept)


def test_what_is_short_stays_whole():
    series = Series(steps=(1, 2), values=(0.5, None))
    assert thinned(series) is series
