"""Whether attention separates objects: how much of it stays within the query's own class.

The paper shows pictures (figure 2); this is a number. For every patch that lies on an object, the
share of its attention that falls on patches of the same class, over the share of the image that
these patches are: the lift. 1 is what attention would have that looks at nothing.

    classes = patch_classes(label_maps, grid=14, ignore=255)
    shares = class_shares(weights.mean(axis=1), classes, background=(0,))
    shares.lift()  # [b]; mean_and_error of it is the figure

The query itself is left out, of the attention and of the area: that a patch looks at itself says
nothing. Near patches often have the same class, so a habit of looking near, which the position
alone can teach, lifts as well; `class_shares` of another image's classes tells how much.

Shapes: b images, n tokens (the class token, then grid² patches). NumPy throughout.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from beit_jax.evaluation.attention_maps import grid_of

_VALUES = 256  # labels are 8 bits


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Averages over an image's query patches; NaN for an image that has none.

    Attributes:
      attention: float64 `[b]`: the share of the patches' attention on the query's own class.
      area: float64 `[b]`: the share of the patches that have that class.
    """

    attention: np.ndarray
    area: np.ndarray

    def lift(self) -> np.ndarray:
        """Attention over area, float64 `[b]`."""
        return self.attention / self.area


def patch_classes(labels: np.ndarray, *, grid: int, ignore: int | None) -> np.ndarray:
    """The class that most pixels of a patch have.

    Args:
      labels: uint8 `[b, s, s]`; s is a multiple of grid.
      grid: patches along a side.
      ignore: the label that is no class; None: all are classes.

    Returns:
      int `[b, grid, grid]`; -1 where no class has half of the patch.
    """
    b, side = len(labels), labels.shape[1] // grid
    patches = labels.reshape(b, grid, side, grid, side).swapaxes(2, 3).reshape(-1, side * side)
    counts = np.zeros((len(patches), _VALUES), int)
    np.add.at(counts, (np.arange(len(patches))[:, None], patches), 1)
    if ignore is not None:
        counts[:, ignore] = 0
    classes = np.where(2 * counts.max(axis=1) >= side * side, counts.argmax(axis=1), -1)
    return classes.reshape(b, grid, grid)


def class_shares(
    weights: np.ndarray, classes: np.ndarray, *, background: Sequence[int] = ()
) -> Shares:
    """How much of the attention stays within the query's class.

    Args:
      weights: `[b, n, n]`, (query, key), such as a block's mean over heads.
      classes: int `[b, grid, grid]`, as `patch_classes` returns them; patches of -1 are left out.
      background: classes that are no objects; their patches are looked at but don't ask.

    Returns:
      Averages over the patches that ask: those of a class that is no background and that some
      other patch, but not every other patch, has.

    Raises:
      ValueError: the weights are of another number of patches.
    """
    grid = grid_of(weights)
    if classes.shape != (len(weights), grid, grid):
        raise ValueError(f"classes: {classes.shape}; must be {(len(weights), grid, grid)}")
    flat = classes.reshape(len(classes), -1)
    others = ~np.eye(flat.shape[1], dtype=bool)
    keys = (flat >= 0)[:, None, :] & others
    same = keys & (flat[:, :, None] == flat[:, None, :])
    on_patches = np.asarray(weights, np.float64)[:, 1:, 1:]
    total = (on_patches * keys).sum(axis=-1)
    number, alike = keys.sum(axis=-1), same.sum(axis=-1)
    asks = (flat >= 0) & ~np.isin(flat, background) & (alike > 0) & (alike < number) & (total > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        attention = np.where(asks, (on_patches * same).sum(axis=-1) / total, 0).sum(axis=1)
        area = np.where(asks, alike / number, 0).sum(axis=1)
        queries = asks.sum(axis=1)
        return Shares(attention=attention / queries, area=area / queries)


def mean_and_error(values: np.ndarray) -> tuple[float, float, int]:
    """The mean over images, its standard error, and the number of images; NaNs are left out."""
    values = values[np.isfinite(values)]
    count = len(values)
    if count == 0:
        return math.nan, math.nan, 0
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), error, count
