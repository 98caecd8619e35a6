"""The cross-entropy of every pixel, without ever holding logits at the images' resolution.

A head's logits are upsampled to the label map, bilinearly, before the loss (mmseg 0.11's
`BaseDecodeHead.losses`). For 150 classes at 512 × 512 that is 157 MB an image and head, and several
times that in the backward pass; here it is done strip by strip, and again in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config.segment import IGNORE
from beit_jax.models.convolution import interpolation_weights
from beit_jax.types import Sums

_STRIPS = 8


def pixel_sums(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sums over all pixels of a batch.

    Args:
      logits: float32 `[b, q, q, c]`; upsampled with half-pixel centres, without antialiasing and
        with repeated edges (torch's `interpolate(align_corners=False)`).
      labels: uint8 `[b, s, s]`, s a multiple of q; `IGNORE` is left out of every sum.

    Returns:
      float32 scalars: `loss`, the cross-entropy in nats; `correct`, pixels whose best class is the
      label; `labelled`, pixels that are not ignored.

    Raises:
      ValueError: s is not a multiple of q.
    """
    side, size = logits.shape[1], labels.shape[1]
    if size % side:
        raise ValueError(f"labels {size} pixels wide are not a multiple of logits {side} wide")
    strips = next(n for n in range(min(_STRIPS, side), 0, -1) if side % n == 0)
    rows, factor = side // strips, size // side
    padded = jnp.pad(logits, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
    # Strips have their neighbours' rows at both ends; columns have no neighbours but themselves.
    down, across = _upsampling(rows, factor=factor), interpolation_weights(side, size)
    # A TPU would round the factors to bfloat16.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    @jax.checkpoint
    def strip(padded: jax.Array, labels: jax.Array, number: jax.Array) -> Sums:
        part = jax.lax.dynamic_slice_in_dim(padded, number * rows, rows + 2, axis=1)
        # Classes come before rows and columns, which fill a TPU's vectors of 128: as products, and
        # in this order, both heads' losses take 15 ms instead of 52 of BEiT-B's step at 512 on v4.
        tall = product("yi,bijc->bcyj", down, part)
        whole = product("bcyj,xj->bcyx", tall, across)
        target = jax.lax.dynamic_slice_in_dim(labels, number * rows * factor, rows * factor, axis=1)
        return _sums(whole, target)

    def add(total: Sums, number: jax.Array) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, strip(padded, labels, number)), None

    zeros = {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "labelled")}
    total, _ = jax.lax.scan(add, zeros, jnp.arange(strips))
    return total


def _upsampling(number: int, *, factor: int) -> np.ndarray:
    """Bilinear weights from n values and one more at both ends to n · factor values.

    Result i lies at (i + 0.5) / factor - 0.5 of the n values, between two neighbours.

    Returns:
      float32 `[n * factor, n + 2]`.
    """
    place = (np.arange(number * factor) + 0.5) / factor + 0.5  # the first of n + 2 is at 0
    distance = np.abs(place[:, None] - np.arange(number + 2))
    return np.maximum(1 - distance, 0).astype(np.float32)


def _sums(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sums over pixels, from logits `[b, c, h, w]` and labels `[b, h, w]`."""
    labelled = labels != IGNORE
    classes = jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1], 1, 1), 1)
    picked = jnp.where(classes == labels[:, None], logits, 0.0).sum(axis=1)
    loss = jnp.where(labelled, jax.nn.logsumexp(logits, axis=1) - picked, 0.0)
    correct = labelled & (jnp.argmax(logits, axis=1) == labels)
    return {
        "loss": loss.sum(),
        "correct": correct.sum(dtype=jnp.float32),
        "labelled": labelled.sum(dtype=jnp.float32),
    }
