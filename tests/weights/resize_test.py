"""Positions at another resolution, against SciPy and PyTorch."""

import numpy as np
import pytest

from beit_jax.models.relative_positions import table_rows
from beit_jax.weights import resize


def reference_table(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """The official rule with SciPy's splines, in the official order of steps."""
    interpolate = pytest.importorskip("scipy.interpolate", reason="SciPy is the reference")
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q**j for j in range((2 * old - 1) // 2)) > (2 * new - 1) // 2:
            high = q
        else:
            low = q
    distances, current = [], 1.0
    for i in range((2 * old - 1) // 2):
        distances.append(current)
        current += q ** (i + 1)
    x = np.array([-d for d in reversed(distances)] + [0.0] + distances)
    asked = np.clip(np.arange(-(new - 1), new), x[0], x[-1])
    columns = []
    for head in range(table.shape[1]):
        values = table[:-3, head].reshape(2 * old - 1, 2 * old - 1).astype(np.float64)
        spline = interpolate.RectBivariateSpline(x, x, values, kx=3, ky=3, s=0)
        columns.append(spline(asked, asked).reshape(-1))
    return np.concatenate([np.stack(columns, axis=1), table[-3:]])


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (24, 32), (14, 40), (5, 8)])
def test_tables_agree_with_scipy(old, new):
    table = np.random.default_rng(0).normal(size=(table_rows(old), 3)).astype(np.float32)
    actual = resize.resize_table(table, grid=new)
    assert actual.shape == (table_rows(new), 3)
    assert actual.dtype == np.float32
    expected = reference_table(table, old, new)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert np.abs(expected[:-3]).max() > 0.5


@pytest.mark.parametrize("new", [24, 32])
def test_centre_neighbours_and_class_token_rows_are_unchanged(new):
    table = np.random.default_rng(1).normal(size=(table_rows(14), 2)).astype(np.float32)
    actual = resize.resize_table(table, grid=new)
    before = table[:-3].reshape(27, 27, 2)[12:15, 12:15]
    centre = new - 1
    after = actual[:-3].reshape(2 * new - 1, 2 * new - 1, 2)
    np.testing.assert_array_equal(after[centre - 1 : centre + 2, centre - 1 : centre + 2], before)
    np.testing.assert_array_equal(actual[-3:], table[-3:])


def test_ratios_are_the_published_ones():
    for old, new, ratio in (
        (14, 24, 1.0903074),
        (14, 32, 1.1349178),
        (14, 40, 1.1685036),
        (24, 32, 1.0261434),
    ):
        assert abs(resize.geometric_ratio(old, new) - ratio) < 1e-6


def test_stacked_tables_are_resized_block_by_block():
    tables = np.random.default_rng(2).normal(size=(4, table_rows(5), 2)).astype(np.float32)
    together = resize.resize_table(tables, grid=7)
    for block, table in enumerate(tables):
        np.testing.assert_allclose(
            together[block], resize.resize_table(table, grid=7), rtol=0, atol=1e-6
        )


def test_the_spline_reproduces_cubics():
    """Not-a-knot: a cubic polynomial is its own spline, up to the ends."""
    known = np.cumsum([0.0, 1.0, 1.3, 0.7, 2.0, 1.1])
    asked = np.linspace(known[0], known[-1], 23)

    def cubic(x):
        return 2 - x + 0.5 * x**2 - 0.3 * x**3

    np.testing.assert_allclose(
        resize.cubic_spline_matrix(known, asked) @ cubic(known), cubic(asked), atol=1e-10
    )


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (3, 5)])
def test_absolute_positions_agree_with_torch(old, new):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    positions = np.random.default_rng(3).normal(size=(1, 1 + old * old, 6)).astype(np.float32)
    actual = resize.resize_positions(positions, grid=new)
    patches = torch.from_numpy(positions[:, 1:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        patches, size=(new, new), mode="bicubic", align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(1, new * new, 6).numpy()
    np.testing.assert_allclose(actual[:, 1:], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(actual[:, :1], positions[:, :1])


def test_the_same_size_is_the_same_array():
    table = np.ones((table_rows(5), 2), np.float32)
    assert resize.resize_table(table, grid=5) is table


def test_sizes_of_no_square_grid_are_named():
    with pytest.raises(ValueError, match=r"no square grid has a .* table of 731 rows"):
        resize.resize_table(np.zeros((731, 2), np.float32), grid=24)
    with pytest.raises(ValueError, match="196 positions do not make a square grid"):
        resize.resize_positions(np.zeros((1, 196, 2), np.float32), grid=24)
    with pytest.raises(ValueError, match="2 × 2 grid is too small"):
        resize.resize_table(np.zeros((table_rows(2), 2), np.float32), grid=4)
