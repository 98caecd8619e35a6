"""The picture of pre-training that shows what the encoder attends to in held-out images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.drawing.figure import figure, shown_side
from beit_jax.drawing.heat import heat, marked, over, scale
from beit_jax.evaluation.attention_maps import query_map, to_pixels
from beit_jax.evaluation.features import needed_params
from beit_jax.models.functional import Functional
from beit_jax.preprocessing import normalize
from beit_jax.types import Params

IMAGES = 4  # in the picture
_BRIGHTEST = 99  # percentile of a map that has the brightest colour: single patches would hide all


def attention_picture(
    params: Params, *, encoder: Functional, block: int, images: np.ndarray, normalization: str
) -> np.ndarray:
    """Draws what the class token and the patch in the middle attend to, the mean of all heads.

    Args:
      params: the whole model's, on this host.
      encoder: from `evaluation.features.frozen_encoder`.
      block: from 1, whose attention is shown.
      images: uint8 `[b, s, s, 3]`; the first four are drawn.
      normalization: of the model's pixels.

    Returns:
      uint8 `[h, w, 3]`.
    """
    images = images[:IMAGES]
    pixels = normalize(jnp.asarray(images), kind=normalization)
    found = _weigh(needed_params(params["encoder"]), pixels, encoder=encoder, block=block)
    weights = np.asarray(found)
    grid = query_map(weights, query=None).shape[-1]
    side, middle = images.shape[1], grid // 2
    patch = side // grid
    top, bottom = middle * patch, (middle + 1) * patch
    rows = []
    for image, of_image in zip(images, weights, strict=True):
        row = [image]
        for query in (None, (middle, middle)):
            attention = query_map(of_image, query=query)
            brightest = float(np.percentile(attention, _BRIGHTEST))
            shown = heat(to_pixels(attention, image_size=side), largest=brightest)
            if query is not None:
                row.append(marked(image, box=(top, top, bottom, bottom)))
            row.append(over(image, shown))
        rows.append(row)
    return figure(
        rows,
        title="Attention in held-out images",
        columns=["image", "of the class token", "a patch", "of that patch"],
        legend=scale("0", "the share that 1 % of the patches reach"),
        note=f"Block {block}, the mean of its heads; every map has a scale of its own.",
        cell=shown_side(side),
    ).pixels


# Compiled once for all the pictures of a run.
@functools.partial(jax.jit, static_argnames=("encoder", "block"))
def _weigh(params: Params, pixels: jax.Array, *, encoder: Functional, block: int) -> jax.Array:
    """Attention weights of a block, the mean of its heads: float32 `[b, n, n]`."""
    weights = encoder.apply(params, pixels, method="attention_weights", blocks=(block,))
    return weights[0].mean(axis=1)
