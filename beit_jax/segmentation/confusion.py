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

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from beit_jax.config import check
from beit_jax.types import Sums

Carry = TypeVar("Carry")

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


def add(sums: Sums, scores: jax.Array, labels: jax.Array, *, passes: int = 1) -> Sums:
    """Adds the pixels of some images.

    Args:
      sums: so far.
      scores: float32 `[b, c, h, w]`, of which the largest is the prediction: logits, or after
        several passes the sum of their probabilities.
      labels: uint8 `[b, h, w]`; 255 is ignored, as is every label that is no class.
      passes: how many.
    """
    classes = scores.shape[1]
    largest, predicted = strongest(scores)
    counted = labels < classes
    found = {
        "intersection": _histogram(labels, counted & (predicted == labels)),
        "predicted": _histogram(predicted, counted),
        "labelled": _histogram(labels, counted),
    }
    new = {
        name: _carried(sums[name] + _halves(count[:, :classes]).sum(axis=0))
        for name, count in found.items()
    }
    own = over_classes(
        lambda c, score, own: jnp.where(labels == c, score, own), jnp.zeros_like(largest), scores
    )
    if passes == 1:
        losses = log_sum_exp(scores, largest) - own
    else:
        losses = jnp.log(passes / jnp.maximum(own, jnp.finfo(jnp.float32).tiny))
    return new | {"loss": sums["loss"] + jnp.where(counted, losses, 0.0).sum()}


def over_classes(body: Callable[..., Carry], start: Carry, scores: jax.Array) -> Carry:
    """Folds `body(class, its scores [b, h, w], carry)` over the classes of scores `[b, c, h, w]`.

    A reduction over an axis that is not the last is several times slower on a CPU. Eight classes
    are one step, since a GPU starts its kernels anew in every step.
    """

    def step(c: jax.Array, carry: Carry) -> Carry:
        return body(c, lax.dynamic_index_in_dim(scores, c, axis=1, keepdims=False), carry)

    return lax.fori_loop(0, scores.shape[1], step, start, unroll=min(8, scores.shape[1]))


def strongest(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest score of every pixel and its class, the first of equal ones.

    Args:
      scores: float32 `[b, c, h, w]`.

    Returns:
      float32 and uint8 `[b, h, w]`.
    """

    def body(
        c: jax.Array, score: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        largest, which = carry
        larger = score > largest
        return jnp.where(larger, score, largest), jnp.where(larger, c.astype(jnp.uint8), which)

    shape = (scores.shape[0], *scores.shape[2:])
    start = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.uint8))
    return over_classes(body, start, scores)


def log_sum_exp(scores: jax.Array, largest: jax.Array) -> jax.Array:
    """What logits exceed log probabilities by: float32 `[b, h, w]`.

    Args:
      scores: logits, float32 `[b, c, h, w]`.
      largest: of each pixel, `[b, h, w]`.
    """
    total = over_classes(
        lambda _, score, total: total + jnp.exp(score - largest), jnp.zeros_like(largest), scores
    )
    return largest + jnp.log(total)


def _histogram(values: jax.Array, counted: jax.Array) -> jax.Array:
    """How often each of 256 values occurs in each image, among the pixels that count.

    A product of one-hot halves of the bytes: 32 comparisons a pixel in place of 256. It is exact,
    as float32 holds every count up to 2^24, the most that a tile can have.

    Args:
      values: uint8 `[b, h, w]`.
      counted: bool `[b, h, w]`.

    Returns:
      int32 `[b, 256]`.
    """
    flat = values.reshape(len(values), 1, -1)
    digits = jnp.arange(16, dtype=jnp.uint8)[:, None]
    high = ((flat >> 4) == digits).astype(jnp.float32)
    low = (((flat & 15) == digits) & counted.reshape(flat.shape)).astype(jnp.float32)
    # Zeros and ones are the same in every precision.
    counts = jnp.einsum("bhn,bln->bhl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(-1, 256).astype(jnp.int32)


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
