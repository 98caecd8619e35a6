"""Relative position bias: a learned number per head for every offset between two patches.

The tables are as in modeling_finetune.py:75-93.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from beit_jax.config import ModelConfig
from beit_jax.models.attention import split_over_devices

# Rows of a relative-position table after the (2g-1)² patch offsets: class token to patch, patch to
# class token, class token to itself (modeling_finetune.py:91-93).
EXTRA_TABLE_ROWS = 3


def table_rows(grid: int) -> int:
    """Rows of a relative-position table for a `grid` × `grid` image: 732 for 14."""
    return (2 * grid - 1) ** 2 + EXTRA_TABLE_ROWS


@functools.cache
def relative_position_index(grid: int) -> np.ndarray:
    """The table row that holds the bias of (query, key): int32 `[n, n]`, n = 1 + grid²."""
    row, column = np.divmod(np.arange(grid * grid), grid)
    rows = table_rows(grid)
    n = grid * grid + 1
    index = np.empty((n, n), np.int32)
    delta_row = row[:, None] - row[None, :] + grid - 1
    delta_column = column[:, None] - column[None, :] + grid - 1
    index[1:, 1:] = delta_row * (2 * grid - 1) + delta_column
    index[0, :] = rows - 3  # query is the class token
    index[:, 0] = rows - 2  # key is the class token
    index[0, 0] = rows - 1
    return index


class RelativePositionBias(nnx.Module):
    """A learned bias of attention scores per head and relative position."""

    def __init__(self, config: ModelConfig):
        self.grid = config.grid
        self.table = nnx.Param(jnp.zeros((table_rows(config.grid), config.heads)))

    def __call__(self, *, batch: int) -> jax.Array:
        """The bias, float32 `[copies, h, n, n]`, with a copy for every device that has images.

        Args:
          batch: images on all devices.
        """
        tables = split_over_devices(self.table[...], batch=batch)
        bias = tables[:, relative_position_index(self.grid)]
        return rearrange(bias, "copies q k h -> copies h q k")
