"""The chart: its curve falls, over the whole width, and starts at the largest value."""

import numpy as np

from beit_jax.drawing import chart


def test_the_curve_falls_over_the_whole_width():
    shares = np.array([0.01, 0.9, 0.0899, 0.0001])
    picture = chart.falling(
        shares, width=400, level=0.25, level_name="alike", x_name="tokens", y_name="how often"
    )
    assert picture.shape[1] == 400
    curve = (picture == chart._CURVE).all(axis=-1)
    columns = np.flatnonzero(curve.any(axis=0))
    assert columns[0] <= 66
    assert columns[-1] >= 390
    heights = [np.flatnonzero(curve[:, x]).mean() for x in columns]
    assert (np.diff(heights) >= -1).all()
    # From nearly 100 % to 0.01 %: nearly the whole height.
    assert heights[-1] - heights[0] > 0.9 * chart._HEIGHT
