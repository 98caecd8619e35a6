"""Colour jitter on the device, for views that were left without it (`fidelity="fast"`).

The arithmetic is Pillow's, with its truncation after each step. It differs from the official order
of things in what it is given: a view in place of the whole image, from which contrast takes its
mean, and pixels that have been resized already.
"""

import jax
import jax.numpy as jnp

from beit_jax.preprocessing import CONTRAST, JITTER_FIELDS, LUMA, SATURATION
from beit_jax.training.state import Batch

VIEWS = ("image", "token_image")


def jitter_batch(batch: Batch) -> Batch:
    """The batch with its views jittered, where `factors` and `order` are in it; else as it is."""
    if "factors" not in batch:
        return batch
    factors, order = batch["factors"], batch["order"]
    rest = {name: value for name, value in batch.items() if name not in JITTER_FIELDS}
    return rest | {
        name: jitter(batch[name], factors=factors, order=order) for name in VIEWS if name in batch
    }


def jitter(images: jax.Array, *, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation, in each image's own order.

    Args:
      images: uint8 [b, h, w, 3].
      factors: float32 [b, 3], of brightness, contrast and saturation.
      order: int32 [b, 3], which of the three comes first, second, third.

    Returns:
      uint8 [b, h, w, 3].
    """
    pixels = jnp.asarray(images).astype(jnp.float32)
    for place in range(3):
        which = order[:, place, None, None, None]
        factor = jnp.take_along_axis(factors, order[:, place, None], axis=1)[..., None, None]
        grey = jnp.floor(sum(pixels[..., c, None] * LUMA[c] for c in range(3)) + 0.5)
        mean = jnp.floor(grey.mean(axis=(1, 2), keepdims=True) + 0.5)
        towards = jnp.select([which == CONTRAST, which == SATURATION], [mean, grey], 0.0)
        pixels = jnp.floor(jnp.clip(towards + factor * (pixels - towards), 0.0, 255.0))
    return pixels.astype(jnp.uint8)
