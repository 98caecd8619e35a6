"""Positions at another resolution: the official rules (run_class_finetuning.py:362-437).

Both rules are separable: one float64 matrix `[new, old]` is applied along rows and along columns.
"""

import math

import numpy as np

from beit_jax.models.relative_positions import EXTRA_TABLE_ROWS, table_rows
from beit_jax.types import FlatParams


def grid_of_table(rows: int) -> int:
    """The grid that a relative-position table with this number of rows belongs to: 14 for 732.

    Raises:
      ValueError: no square grid has such a table.
    """
    grid = (math.isqrt(max(rows - EXTRA_TABLE_ROWS, 0)) + 1) // 2
    if rows != table_rows(grid):
        raise ValueError(f"no square grid has a relative-position table of {rows} rows")
    return grid


def grid_of_state(state: FlatParams) -> int | None:
    """The grid that a foreign state dict's tables or positions are for; None without either.

    Raises:
      ValueError: no square grid has such a table.
    """
    for key, array in state.items():
        if key.endswith("relative_position_bias_table"):
            return grid_of_table(array.shape[0])
        if key.endswith(("position_embeddings", "pos_embed")):
            return round((array.shape[1] - 1) ** 0.5)
    return None


def resize_table(table: np.ndarray, *, grid: int) -> np.ndarray:
    """Resizes a relative-position table to another grid.

    The map of patch offsets is read at geometrically growing distances, dense near the centre, and
    interpolated by cubic splines. The class token's rows, the centre and the offsets of one patch
    keep their values. Linear interpolation costs segmentation accuracy (unilm#376). For a smaller
    grid the official search for the ratio ends at its lower limit, which nearly crops the middle.

    Args:
      table: `[..., old rows, heads]`.
      grid: patches along one side afterwards.

    Returns:
      `[..., table_rows(grid), heads]`, float32.

    Raises:
      ValueError: no square grid has such a table, or it is too small for a cubic.
    """
    old = grid_of_table(table.shape[-2])
    if old == grid:
        return table
    size = 2 * old - 1
    if size < 4:
        raise ValueError(f"a {old} × {old} grid is too small to interpolate from")
    matrix = geometric_matrix(old, grid)
    offsets, extra = np.split(table.astype(np.float64), [size * size], axis=-2)
    offsets = offsets.reshape(*table.shape[:-2], size, size, table.shape[-1])
    offsets = np.einsum("ir,js,...rsh->...ijh", matrix, matrix, offsets, optimize=True)
    offsets = offsets.reshape(*table.shape[:-2], -1, table.shape[-1])
    return np.concatenate([offsets, extra], axis=-2).astype(np.float32)


def geometric_matrix(old: int, new: int) -> np.ndarray:
    """Maps offsets along one axis from grid `old` to `new`: float64 `[2 new - 1, 2 old - 1]`."""
    ratio = geometric_ratio(old, new)
    distances = np.cumsum(ratio ** np.arange(old - 1))
    known = np.concatenate([-distances[::-1], [0.0], distances])
    asked = np.arange(-(new - 1), new, dtype=np.float64)
    return cubic_spline_matrix(known, np.clip(asked, known[0], known[-1]))


def geometric_ratio(old: int, new: int) -> float:
    """The ratio whose old - 1 steps, starting with 1, reach offset new - 1; 1.0903 for 14 → 24.

    The official bisection: between 1.01 and 1.5, to 1e-6, and its last midpoint.
    """
    low, high = 1.01, 1.5
    middle = low
    while high - low > 1e-6:
        middle = (low + high) / 2
        reach = (1.0 - middle ** (old - 1)) / (1.0 - middle)
        if reach > new - 1:
            high = middle
        else:
            low = middle
    return middle


def cubic_spline_matrix(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Interpolation by the cubic spline with not-a-knot ends, as a matrix on the values.

    Args:
      known: ascending coordinates of the values, `[n]`, n at least 4.
      asked: coordinates within their range, `[m]`.

    Returns:
      float64 `[m, n]`; the row of a coordinate that is among `known` has a single 1.
    """
    n = len(known)
    h = np.diff(known)
    # Second derivatives d of the spline: left @ d = right @ values.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    # The third derivative is continuous at the second and the last but one point.
    left[0, :3] = h[1], -h[0] - h[1], h[0]
    left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
    curvature = np.linalg.solve(left, right)

    interval = np.clip(np.searchsorted(known, asked, side="right") - 1, 0, n - 2)
    step = h[interval][:, None]
    behind = (asked - known[interval])[:, None]
    ahead = step - behind
    values = np.eye(n)
    matrix = (
        (ahead**3 / (6 * step) - ahead * step / 6) * curvature[interval]
        + (behind**3 / (6 * step) - behind * step / 6) * curvature[interval + 1]
        + ahead / step * values[interval]
        + behind / step * values[interval + 1]
    )
    for row, coordinate in enumerate(asked):
        (exact,) = np.nonzero(known == coordinate)
        if len(exact):
            matrix[row] = values[exact[0]]
    return matrix


def resize_positions(positions: np.ndarray, *, grid: int) -> np.ndarray:
    """Resizes absolute position embeddings to another grid, bicubic; the class token's stays.

    Args:
      positions: `[1, 1 + old², d]`.
      grid: patches along one side afterwards.

    Returns:
      float32 `[1, 1 + grid², d]`, as PyTorch's `interpolate(mode="bicubic", align_corners=False)`.

    Raises:
      ValueError: the positions are not those of a square grid.
    """
    old = math.isqrt(positions.shape[1] - 1)
    if old * old + 1 != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions do not make a square grid")
    if old == grid:
        return positions
    matrix = bicubic_matrix(old, grid)
    extra, patches = np.split(positions.astype(np.float64), [1], axis=1)
    patches = patches.reshape(old, old, -1)
    patches = np.einsum("ir,js,rsd->ijd", matrix, matrix, patches, optimize=True)
    return np.concatenate([extra, patches.reshape(1, grid * grid, -1)], axis=1).astype(np.float32)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Cubic convolution (a = -0.75) at pixel centres, borders repeated: float64 `[new, old]`."""
    a = -0.75
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre)
        for tap in range(first - 1, first + 3):
            x = abs(centre - tap)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += weight
    return matrix
