"""Colour jitter on the device, for views that the host has not jittered (`fidelity="fast"`).

The arithmetic is Pillow's, with its truncation after every operation. The official order differs in
the input: there the whole image is jittered before it is cropped and resized. Here it is the view,
so contrast takes its mean from the crop, and pixels are resized already.
"""

import jax
import jax.numpy as jnp

from beit_jax.preprocessing import CONTRAST, JITTER_FIELDS, LUMA, SATURATION
from beit_jax.types import Batch

VIEWS = ("image", "token_image")


def jitter_batch(batch: Batch) -> Batch:
    """Jitters the views of a batch that has `factors` and `order`; returns others unchanged."""
    if "factors" not in batch:
        return batch
    factors, order = batch["factors"], batch["order"]
    rest = {name: value for name, value in batch.items() if name not in JITTER_FIELDS}
    return rest | {
        name: jitter(batch[name], factors=factors, order=order) for name in VIEWS if name in batch
    }


def jitter(images: jax.Array, *, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation, in an order of its own for every image.

    Args:
      images: uint8 [b, h, w, 3].
      factors: float32 [b, 3], of brightness, contrast and saturation.
      order: int32 [b, 3], which of the three comes first, second, third.

    Returns:
      uint8 [b, h, w, 3].
    """
    pixels = jnp.asarray(images).astype(jnp.float32)
    for position in range(3):
        which = order[:, position, None, None, None]
        factor = jnp.take_along_axis(factors, order[:, position, None], axis=1)[..., None, None]
        grey = jnp.floor(sum(pixels[..., c, None] * LUMA[c] for c in range(3)) + 0.5)
        mean = jnp.floor(grey.mean(axis=(1, 2), keepdims=True) + 0.5)
        towards = jnp.select([which == CONTRAST, which == SATURATION], [mean, grey], 0.0)
        pixels = jnp.floor(jnp.clip(towards + factor * (pixels - towards), 0.0, 255.0))
    return pixels.astype(jnp.uint8)
