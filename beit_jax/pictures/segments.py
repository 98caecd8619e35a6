"""What a model separates without labels: patch features in colours, and threshold masks.

Colours are the first three principal components of the patch features of all images shown: what
looks alike to the model has the same colour in every row. A mask keeps the patches that together
hold most of a query's attention (the paper's figure 2; DINO's masks).
"""

import argparse

import numpy as np

from beit_jax.config import check
from beit_jax.drawing.figure import figure, shown_side
from beit_jax.drawing.heat import shaded
from beit_jax.evaluation.attention_maps import (
    SHARE,
    pca_colours,
    query_map,
    threshold_mask,
    to_pixels,
)
from beit_jax.pictures import inputs
from beit_jax.pretrained import PretrainedEncoder

SUMMARY = "patch features in colours, and masks of the attention"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this picture."""
    option = command.add_argument
    inputs.add_options(command)
    option(
        "--at",
        type=inputs.point,
        default=(0.5, 0.5),
        metavar="X,Y",
        help="the point whose patch asks, as shares of the sides (default: 0.5,0.5)",
    )
    option("--share", type=float, default=SHARE, help=f"of the attention (default: {SHARE})")
    option("--block", type=int, default=-1, help="from 1, or from the last: -1 (default)")


def draw(encoder: PretrainedEncoder, options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture of all images, named "segments": uint8 `[H, W, 3]`.

    Raises:
      ConfigError: an image can't be read, there is no such block, or the share is none.
    """
    block = inputs.chosen_block(options.block, layers=encoder.config.layers)
    check(0 < options.share <= 1, "--share", f"{options.share}; must be above 0 and at most 1")
    names, images = inputs.load_inputs(options, size=encoder.image_size)
    (output,) = encoder.blocks(images, (block,))
    size, side = encoder.image_size, encoder.image_size // encoder.grid
    colours = pca_colours(np.asarray(output.patches))
    colours = colours.repeat(side, axis=1).repeat(side, axis=2)
    query = inputs.patch_at(options.at, grid=encoder.grid)
    rows = []
    for image, features in zip(images, colours, strict=True):
        weights = np.asarray(encoder.attention(image[None], (block,)))[0, 0].mean(axis=0)
        masks = [
            threshold_mask(query_map(weights, query=each), share=options.share)
            for each in (None, query)
        ]
        of_class, of_patch = (shaded(image, to_pixels(mask, image_size=size)) for mask in masks)
        of_patch = inputs.framed(of_patch, query=query, grid=encoder.grid)
        rows.append([image, features, of_class, of_patch])
    drawn = figure(
        rows,
        title="What the model separates without labels",
        columns=("image", "patch features", "class token's attention", "framed patch's attention"),
        labels=names,
        note="Patch features: the first three principal components of all these images' patches as"
        f" red, green and blue. Attention: the patches that together hold {options.share:.0%} of"
        f" it, mean of heads. Both of block {block} of {encoder.config.layers}.",
        cell=shown_side(size),
    )
    return [("segments", drawn.pixels)]
