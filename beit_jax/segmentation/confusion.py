"""How well class maps agree: pixels counted by class, and the scores that follow from them.

    sums = empty(classes)
    sums = add(sums, scores, labels)          # on devices, any number of times; sums add up
    scores(sums, names=("sky", "road"))       # {"miou": 0.41, "macc": …, "iou/sky": …}
    compare(predicted, labels, names=...)     # the same of two class maps on the host

A validation set has more pixels than float32 or int32 counts, so a count is two int32: multiples of
1024, and the rest. Both add up over batches and hosts, exactly up to 2^21 batches and 2^41 pixels.

Source: mmseg's core/evaluation/metrics.py (intersect_and_union, mean_iou): histograms over all
images, not a mean of images' scores; pixels labelled 255 are dropped, whatever is predicted there.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config import check
from beit_jax.types import Sums

_BITS = 10  # of the smaller part of a count
# What is counted, of pixels that have a label, by class.
COUNTS = ("intersection", "predicted", "labelled")


def empty(classes: int) -> Sums:
    """Sums of no pixel.

    Returns:
      "intersection", "predicted", "labelled": int32 `[classes, 2]`, multiples of 1024 and the rest;
      "loss": float32, the cross-entropy summed over pixels.
    """
    counts = {name: jnp.zeros((classes, 2), jnp.int32) for name in COUNTS}
    return counts | {"loss": jnp.zeros((), jnp.float32)}


def add(sums: Sums, scores: jax.Array, labels: jax.Array, *, probabilities: bool = False) -> Sums:
    """Adds the pixels of some images.

    Args:
      sums: so far.
      scores: float32 `[b, c, h, w]`, of which the largest is the prediction.
      labels: uint8 `[b, h, w]`; 255 is ignored, as is every label that is no class.
      probabilities: scores are probabilities up to a factor of a pixel, else logits.
    """
    classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
    counted = labels < classes
    which = jnp.arange(classes)[:, None, None]
    is_label = labels[:, None] == which
    found = {
        "intersection": is_label & (predicted == labels)[:, None],
        "predicted": (predicted[:, None] == which) & counted[:, None],
        "labelled": is_label,
    }
    new = {
        name: _carried(sums[name] + _halves(mask.sum(axis=(2, 3), dtype=jnp.int32)).sum(axis=0))
        for name, mask in found.items()
    }
    logs = jnp.log(jnp.maximum(scores, jnp.finfo(jnp.float32).tiny)) if probabilities else scores
    of_label = jnp.where(is_label, logs, 0.0).sum(axis=1)
    norm = jnp.log(scores.sum(axis=1)) if probabilities else jax.nn.logsumexp(scores, axis=1)
    loss = jnp.where(counted, norm - of_label, 0.0).sum()
    return new | {"loss": sums["loss"] + loss}


def _halves(count: jax.Array) -> jax.Array:
    """A count as multiples of 1024 and the rest, along a new last axis."""
    return jnp.stack([count >> _BITS, count & ((1 << _BITS) - 1)], axis=-1)


def _carried(halves: jax.Array) -> jax.Array:
    """The same count with a rest below 1024."""
    more, rest = jnp.moveaxis(_halves(halves[..., 1]), -1, 0)
    return jnp.stack([halves[..., 0] + more, rest], axis=-1)


def scores(sums: Mapping[str, jax.Array | np.ndarray], *, names: Sequence[str]) -> dict[str, float]:
    """Scores of summed counts, computed on the host in float64.

    Args:
      sums: of `empty` and `add`, summed over batches; whole on this host.
      names: of the classes.

    Returns:
      "miou", "macc": means over the classes that are predicted or labelled, or labelled (mIoU,
      mAcc); "aacc": the share of pixels that are right; "iou/NAME" of every class that is predicted
      or labelled; "loss": mean cross-entropy. NaN where no pixel has a label.
    """
    intersection, predicted, labelled = (
        np.asarray(sums[name]).astype(np.int64) @ np.asarray([1 << _BITS, 1]) for name in COUNTS
    )
    check(len(names) == len(labelled), "names", f"{len(names)} for {len(labelled)} classes")
    pixels = labelled.sum()
    loss = float(np.asarray(sums["loss"])) / pixels if pixels else np.nan
    return _scores(intersection, predicted, labelled, names=names) | {"loss": float(loss)}


def compare(
    predictions: np.ndarray, labels: np.ndarray, *, names: Sequence[str]
) -> dict[str, float]:
    """Scores of class maps, on the host.

    Args:
      predictions: uint8, of any shape.
      labels: uint8, of the same shape; 255 is ignored, as is every label that is no class.
      names: of the classes.

    Returns:
      As `scores`, without a loss.
    """
    classes = len(names)
    counted = labels < classes
    predicted, labelled = predictions[counted], labels[counted]
    counts = (
        np.bincount(part, minlength=classes)[:classes].astype(np.int64)
        for part in (labelled[predicted == labelled], predicted, labelled)
    )
    return _scores(*counts, names=names)


def _scores(
    intersection: np.ndarray, predicted: np.ndarray, labelled: np.ndarray, *, names: Sequence[str]
) -> dict[str, float]:
    union = predicted + labelled - intersection
    present, known = union > 0, labelled > 0
    iou = intersection[present] / union[present]
    accuracy = intersection[known] / labelled[known]
    pixels = labelled.sum()
    summary = {
        "miou": iou.mean() if present.any() else np.nan,
        "macc": accuracy.mean() if known.any() else np.nan,
        "aacc": intersection.sum() / pixels if pixels else np.nan,
    }
    kept = [name for name, there in zip(names, present, strict=True) if there]
    each = {f"iou/{name}": value for name, value in zip(kept, iou, strict=True)}
    return {name: float(value) for name, value in (summary | each).items()}
