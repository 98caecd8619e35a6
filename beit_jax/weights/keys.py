"""Key tables: how a foreign format names and lays out the parameters, in both directions.

A table is a tuple of rows, foreign key ↔ (native paths, transform). "{}" in a foreign key is the
block's number; the native tree has the blocks stacked on a leading axis. A row applies where the
model has all of its paths, so one table serves every variant.

    state = to_foreign(params, TABLE)        # {"blocks.0.attn.qkv.weight": array, ...}
    params = to_native(state, TABLE, layers=12)  # {"encoder/blocks/attention/query/kernel": ...}
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from beit_jax.types import FlatParams


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse.

    Attributes:
      to_native: foreign array → native arrays, one per path.
      to_foreign: native arrays → foreign array.
      counts: whether the foreign array is a whole number, not of floats.
      variances: whether no number may be below 0.
    """

    to_native: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_foreign: Callable[..., np.ndarray]
    counts: bool = False
    variances: bool = False


SAME = Transform(lambda x: (x,), lambda x: x)
VARIANCE = Transform(lambda x: (x,), lambda x: x, variances=True)
# Linear layers: (out, in) ↔ (in, out).
LINEAR = Transform(lambda w: (w.T,), lambda kernel: kernel.T)
# Convolutions: (out, in, height, width) ↔ (height, width, in, out).
CONV = Transform(lambda w: (w.transpose(2, 3, 1, 0),), lambda kernel: kernel.transpose(3, 2, 0, 1))
# Transposed convolutions: (in, out, height, width) ↔ (height, width, in, out).
TRANSPOSED_CONV = Transform(
    lambda w: (w.transpose(2, 3, 0, 1),), lambda kernel: kernel.transpose(2, 3, 0, 1)
)
# How many batches a BatchNorm has averaged over: PyTorch's int64 ↔ float32, which is exact up to
# `LARGEST_COUNT`.
COUNT = Transform(
    lambda n: (n.astype(np.float32),), lambda count: count.astype(np.int64), counts=True
)
LARGEST_COUNT = 1 << 24
# Query, key and value in one matrix (3 · out, in), rows in this order (modeling_finetune.py).
FUSED_QKV = Transform(
    lambda w: tuple(part.T for part in np.split(w, 3)),
    lambda *kernels: np.concatenate([kernel.T for kernel in kernels]),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a key table.

    Attributes:
      foreign: the foreign key, "{}" for the block's number.
      native: the paths of what the transform makes, "encoder/cls_token".
      transform: the change of layout.
    """

    foreign: str
    native: tuple[str, ...]
    transform: Transform

    @property
    def per_block(self) -> bool:
        """Whether every block has such a key."""
        return "{}" in self.foreign

    def keys(self, layers: int) -> list[str]:
        """The foreign keys of this row."""
        return [self.foreign.format(i) for i in range(layers)] if self.per_block else [self.foreign]


Table = tuple[Row, ...]


def row(foreign: str, native: str | tuple[str, ...], transform: Transform = SAME) -> Row:
    """Makes a row; `native` may be a single path."""
    return Row(foreign, (native,) if isinstance(native, str) else native, transform)


def weight_and_bias(foreign: str, native: str, transform: Transform) -> Table:
    """Rows for `foreign`.weight and .bias of a linear layer or convolution."""
    return (
        row(f"{foreign}.weight", f"{native}/kernel", transform),
        row(f"{foreign}.bias", f"{native}/bias"),
    )


def norm(foreign: str, native: str) -> Table:
    """Rows for `foreign`.weight and .bias of a LayerNorm."""
    return row(f"{foreign}.weight", f"{native}/scale"), row(f"{foreign}.bias", f"{native}/bias")


def batch_norm(foreign: str, native: str) -> Table:
    """Rows for a BatchNorm: its two parameters and its three running statistics."""
    return (
        *norm(foreign, native),
        row(f"{foreign}.running_mean", f"{native}/mean"),
        row(f"{foreign}.running_var", f"{native}/var", VARIANCE),
        row(f"{foreign}.num_batches_tracked", f"{native}/count", COUNT),
    )


def to_foreign(params: FlatParams, table: Table) -> dict[str, np.ndarray]:
    """Renames parameters to foreign keys, in the order of the table, block after block.

    Args:
      params: flat, "a/b/c" → array.
      table: rows; those of one kind of block must be next to each other.

    Raises:
      ValueError: a parameter that no row covers.
    """
    state: dict[str, np.ndarray] = {}
    for group in _groups(_applicable(params, table)):
        if not group[0].per_block:
            state |= {row.foreign: _foreign_array(row, params) for row in group}
            continue
        for i in range(_layers(group, params)):
            state |= {row.foreign.format(i): _foreign_array(row, params, block=i) for row in group}
    return state


def to_native(state: FlatParams, table: Table, *, layers: int) -> dict[str, np.ndarray]:
    """Renames foreign arrays to parameters; rows whose keys are not all there are left out.

    Args:
      state: foreign key → array; shapes are known to be right.
      table: rows.
      layers: blocks.
    """
    params = {}
    for row in table:
        keys = row.keys(layers)
        if not keys or not all(key in state for key in keys):
            continue
        parts = [row.transform.to_native(state[key]) for key in keys]
        for path, arrays in zip(row.native, zip(*parts, strict=True), strict=True):
            # Not `ascontiguousarray`, which gives a single number an axis.
            whole = np.stack(arrays) if row.per_block else np.asarray(arrays[0], order="C")
            params[path] = whole.astype(np.float32, copy=False)
    return params


def foreign_shapes(
    shapes: Mapping[str, tuple[int, ...]], table: Table
) -> dict[str, tuple[int, ...]]:
    """The foreign keys and shapes of a model with these parameters.

    No parameter is allocated, and a block's transforms run for the first block only.

    Args:
      shapes: flat, "a/b/c" → shape.
      table: rows.

    Raises:
      ValueError: a parameter that no row covers.
    """
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    result: dict[str, tuple[int, ...]] = {}
    for group in _groups(_applicable(zeros, table)):
        if not group[0].per_block:
            result |= {row.foreign: _foreign_array(row, zeros).shape for row in group}
            continue
        first = {row.foreign: _foreign_array(row, zeros, block=0).shape for row in group}
        for i in range(_layers(group, zeros)):
            result |= {foreign.format(i): shape for foreign, shape in first.items()}
    return result


def _applicable(params: FlatParams, table: Table) -> list[Row]:
    """The rows that a model with these parameters has; ValueError where one has no row."""
    rows = [row for row in table if all(path in params for path in row.native)]
    covered = {path for row in rows for path in row.native}
    if params.keys() - covered:
        raise ValueError(f"no key for {', '.join(sorted(params.keys() - covered))}")
    return rows


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Splits rows where per-block ones begin and end."""
    return [list(group) for _, group in itertools.groupby(rows, lambda row: row.per_block)]


def _layers(group: list[Row], params: FlatParams) -> int:
    return params[group[0].native[0]].shape[0]


def _foreign_array(row: Row, params: FlatParams, *, block: int | None = None) -> np.ndarray:
    """One row's foreign array, of one block for a per-block row."""
    arrays = (params[path] for path in row.native)
    return row.transform.to_foreign(*(a if block is None else a[block] for a in arrays))
