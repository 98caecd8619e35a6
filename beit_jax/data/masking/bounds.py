"""Which mask settings fit a grid, and how many patches masks hide at most; plain NumPy."""

import functools
import math

import numpy as np

from beit_jax.config import MaskConfig, check


def check_count(config: MaskConfig, *, grid: int) -> None:
    """Raises ConfigError if the grid has fewer than `count` patches."""
    check(
        config.count <= grid * grid,
        "count",
        f"{config.count} patches cannot be hidden on a {grid} x {grid} grid of {grid * grid}",
    )


def check_official(config: MaskConfig, *, grid: int) -> None:
    """Raises ConfigError if `count` does not fit, or no block can ever be accepted."""
    check_count(config, grid=grid)
    _check_block_sizes(config, grid=grid, name="count", most=config.count)
    limit = area_limit(float(config.count), config)
    sides = np.arange(1, grid)
    fits = reachable(
        sides - 0.5, sides + 0.5, low=config.min_block, high=limit, aspect=config.min_aspect
    )
    check(
        bool((fits & (np.outer(sides, sides) <= limit)).any()),
        "min_block",
        f"no block of {config.min_block} to {limit:g} patches with an aspect between "
        f"{config.min_aspect:g} and {1 / config.min_aspect:g} is shorter and narrower than a "
        f"{grid} x {grid} grid",
    )


def check_paper(config: MaskConfig, *, grid: int) -> None:
    """Raises ConfigError if the first block's range of areas is empty."""
    _check_block_sizes(config, grid=grid, name="ratio", most=config.ratio * grid * grid)


def _check_block_sizes(config: MaskConfig, *, grid: int, name: str, most: float) -> None:
    check(
        config.min_block <= most,
        "min_block",
        f"{config.min_block} is more than the {most:g} patches that {name} hides on a "
        f"{grid} x {grid} grid",
    )
    if config.max_block is not None:
        check(
            config.max_block >= config.min_block,
            "max_block",
            f"{config.max_block} is less than min_block {config.min_block}",
        )


@functools.lru_cache(maxsize=64)
def max_paper(config: MaskConfig, *, grid: int) -> int:
    """The most patches that one mask of "block_paper" can hide.

    A block that is started while k <= ratio * N patches are hidden hides at most its own rounded
    area on top. The bound is therefore the maximum over k of k plus the largest rounded area that
    the sizes allowed at k can reach.
    """
    cells = grid * grid
    sides = np.arange(1, grid + 1)
    # The range of lengths that are rounded, or clipped, to each side.
    shortest = np.where(sides == 1, 1e-9, sides - 0.5)
    longest = np.where(sides == grid, 1e9, sides + 0.5)
    bound = 0
    for hidden in range(math.floor(config.ratio * cells) + 1):
        limit = area_limit(config.ratio * cells - hidden, config)
        low, high = sorted((float(config.min_block), limit))
        fits = reachable(shortest, longest, low=max(low, 1e-9), high=high, aspect=config.min_aspect)
        bound = max(bound, hidden + int(np.max(np.outer(sides, sides) * fits)))
    return min(bound, cells)


def area_limit(left: float, config: MaskConfig) -> float:
    """The largest area that may be drawn while `left` patches may still be hidden."""
    return left if config.max_block is None else min(left, config.max_block)


def reachable(
    shortest: np.ndarray, longest: np.ndarray, *, low: float, high: float, aspect: float
) -> np.ndarray:
    """The pairs of sides to which blocks of certain areas and aspects can be rounded.

    In the plane of (log height, log width), the lengths that round to a pair form a rectangle, and
    the lengths of all blocks form another, rotated by 45 degrees. Two convex shapes meet unless one
    of their four edge directions separates them.

    Args:
      shortest: [n], the least length that becomes each candidate side; positive.
      longest: [n], the greatest such length.
      low: the least area of a block; positive.
      high: the greatest area.
      aspect: the least aspect; the greatest is its inverse.

    Returns:
      bool [n, n] over (height, width).
    """
    low, high, spread = math.log(low), math.log(high), -math.log(aspect)
    start, end = np.log(shortest), np.log(longest)
    tolerance = 1e-9  # shapes that touch count as meeting
    one = (start <= (high + spread) / 2 + tolerance) & (end >= (low - spread) / 2 - tolerance)
    return (
        (start[:, None] + start <= high + tolerance)
        & (end[:, None] + end >= low - tolerance)
        & (start[:, None] - end <= spread + tolerance)
        & (end[:, None] - start >= -spread - tolerance)
        & one[:, None]
        & one
    )
