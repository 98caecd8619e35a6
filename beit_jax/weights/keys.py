"""Key tables: how a foreign format names and lays out our parameters, in both directions.

A table is a tuple of rows, foreign key ↔ (our paths, transform). "{}" in a foreign key is the
block's number; ours has those blocks stacked on a leading axis. A row applies where the model has
all of its paths, so one table serves every variant.

    state = to_foreign(params, TABLE)        # {"blocks.0.attn.qkv.weight": array, ...}
    params = to_ours(state, TABLE, layers=12)  # {"encoder/blocks/attention/query/kernel": ...}
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse.

    Attributes:
      to_ours: foreign array → our arrays, one per path.
      to_foreign: our arrays → foreign array.
      axes: the foreign array's number of axes; None: any.
    """

    to_ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_foreign: Callable[..., np.ndarray]
    axes: int | None = None


SAME = Transform(lambda x: (x,), lambda x: x)
# Linear layers: (out, in) ↔ (in, out).
LINEAR = Transform(lambda w: (w.T,), lambda kernel: kernel.T, axes=2)
# Convolutions: (out, in, height, width) ↔ (height, width, in, out).
CONV = Transform(
    lambda w: (w.transpose(2, 3, 1, 0),), lambda kernel: kernel.transpose(3, 2, 0, 1), axes=4
)
# Query, key and value in one matrix (3 · out, in), rows in this order (modeling_finetune.py).
FUSED_QKV = Transform(
    lambda w: tuple(part.T for part in np.split(w, 3)),
    lambda *kernels: np.concatenate([kernel.T for kernel in kernels]),
    axes=2,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a key table.

    Attributes:
      foreign: the foreign key, "{}" for the block's number.
      ours: our path, or the paths that the transform makes.
      transform: the change of layout.
    """

    foreign: str
    ours: tuple[str, ...]
    transform: Transform

    @property
    def per_block(self) -> bool:
        """Whether every block has such a key."""
        return "{}" in self.foreign

    def keys(self, layers: int) -> list[str]:
        """The foreign keys of this row."""
        return [self.foreign.format(i) for i in range(layers)] if self.per_block else [self.foreign]


Table = tuple[Row, ...]


def row(foreign: str, ours: str | tuple[str, ...], transform: Transform = SAME) -> Row:
    """A row; `ours` may be one path."""
    return Row(foreign, (ours,) if isinstance(ours, str) else ours, transform)


def weight_and_bias(foreign: str, ours: str, transform: Transform) -> Table:
    """Rows for `foreign`.weight and .bias of a linear layer or convolution."""
    return (
        row(f"{foreign}.weight", f"{ours}/kernel", transform),
        row(f"{foreign}.bias", f"{ours}/bias"),
    )


def norm(foreign: str, ours: str) -> Table:
    """Rows for `foreign`.weight and .bias of a LayerNorm."""
    return row(f"{foreign}.weight", f"{ours}/scale"), row(f"{foreign}.bias", f"{ours}/bias")


def to_foreign(params: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Our parameters under foreign names, in the order of the table, block after block.

    Args:
      params: flat, "a/b/c" → array.
      table: rows; those of one kind of block must be next to each other.

    Raises:
      ValueError: a parameter that no row covers.
    """
    rows = [each for each in table if all(path in params for path in each.ours)]
    covered = {path for each in rows for path in each.ours}
    if params.keys() - covered:
        raise ValueError(f"no key for {', '.join(sorted(params.keys() - covered))}")
    state = {}
    for group in _groups(rows):
        if not group[0].per_block:
            state |= {
                r.foreign: r.transform.to_foreign(*(params[p] for p in r.ours)) for r in group
            }
            continue
        for i in range(params[group[0].ours[0]].shape[0]):
            for each in group:
                parts = (params[path][i] for path in each.ours)
                state[each.foreign.format(i)] = each.transform.to_foreign(*parts)
    return state


def to_ours(state: Mapping[str, np.ndarray], table: Table, *, layers: int) -> dict[str, np.ndarray]:
    """Foreign arrays under our names; rows that the state has no or not all keys for are left out.

    Args:
      state: foreign key → array; shapes are known to be right.
      table: rows.
      layers: blocks.
    """
    params = {}
    for each in table:
        keys = each.keys(layers)
        if not keys or not all(key in state for key in keys):
            continue
        parts = [each.transform.to_ours(state[key]) for key in keys]
        for path, arrays in zip(each.ours, zip(*parts, strict=True), strict=True):
            whole = np.stack(arrays) if each.per_block else np.ascontiguousarray(arrays[0])
            params[path] = whole.astype(np.float32, copy=False)
    return params


def foreign_shapes(
    shapes: Mapping[str, tuple[int, ...]], table: Table
) -> dict[str, tuple[int, ...]]:
    """The foreign keys and shapes of a model with these parameters; takes no memory to speak of.

    Args:
      shapes: flat, "a/b/c" → shape.
      table: rows.
    """
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    first = {p: z[:1] if "encoder/blocks/" in p else z for p, z in zeros.items()}
    one_block = {key: array.shape for key, array in to_foreign(first, table).items()}
    layers = next((z.shape[0] for p, z in zeros.items() if "encoder/blocks/" in p), 0)
    result: dict[str, tuple[int, ...]] = {}
    rows = [each for each in table if all(path in shapes for path in each.ours)]
    for group in _groups(rows):
        for i in range(layers if group[0].per_block else 1):
            result |= {r.foreign.format(i): one_block[r.foreign.format(0)] for r in group}
    return result


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Splits rows where per-block ones begin and end."""
    groups: list[list[Row]] = []
    for each in rows:
        if groups and groups[-1][0].per_block == each.per_block:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups
