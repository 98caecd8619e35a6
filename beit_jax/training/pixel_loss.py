"""The cross-entropy of every pixel, without ever holding logits at the images' resolution.

A head's logits are upsampled to the label map, bilinearly, before the loss (mmseg 0.11's
`BaseDecodeHead.losses`). For 150 classes at 512 × 512 that is 157 MB an image and head, and several
times that in the backward pass; here it is done strip by strip, and again in the backward pass.
"""

import jax
import jax.numpy as jnp

from beit_jax.config.segment import IGNORE
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

    @jax.checkpoint
    def strip(padded: jax.Array, labels: jax.Array, number: jax.Array) -> Sums:
        part = jax.lax.dynamic_slice_in_dim(padded, number * rows, rows + 2, axis=1)
        part = _upsample(part, factor=factor, axis=1)
        wide = jnp.pad(part, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
        wide = _upsample(wide, factor=factor, axis=2)
        target = jax.lax.dynamic_slice_in_dim(labels, number * rows * factor, rows * factor, axis=1)
        return _sums(wide, target)

    def add(total: Sums, number: jax.Array) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, strip(padded, labels, number)), None

    zeros = {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "labelled")}
    total, _ = jax.lax.scan(add, zeros, jnp.arange(strips))
    return total


def _upsample(padded: jax.Array, *, factor: int, axis: int) -> jax.Array:
    """Upsamples an axis that has one more element at both ends: n + 2 → n · factor.

    Result i · factor + k lies at i + (k + 0.5) / factor - 0.5, between two of its neighbours whose
    weights depend on k alone.
    """
    number = padded.shape[axis] - 2

    def part(start: int) -> jax.Array:
        return jax.lax.slice_in_dim(padded, start, start + number, axis=axis)

    phases = []
    for k in range(factor):
        at = (k + 0.5) / factor - 0.5
        other = part(0) if at < 0 else part(2)
        phases.append((1 - abs(at)) * part(1) + abs(at) * other)
    stacked = jnp.stack(phases, axis=axis + 1)
    shape = (*padded.shape[:axis], number * factor, *padded.shape[axis + 1 :])
    return stacked.reshape(shape)


def _sums(logits: jax.Array, labels: jax.Array) -> Sums:
    labelled = labels != IGNORE
    classes = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, logits.shape[-1]), 3)
    picked = jnp.where(classes == labels[..., None], logits, 0.0).sum(axis=-1)
    loss = jnp.where(labelled, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    correct = labelled & (jnp.argmax(logits, axis=-1) == labels)
    return {
        "loss": loss.sum(),
        "correct": correct.sum(dtype=jnp.float32),
        "labelled": labelled.sum(dtype=jnp.float32),
    }
