"""What a model separates without labels: patch features in colours, and threshold masks.

Colours are the first three principal components of the patch features of all images shown: what
looks alike to the model has the same colour in every row. A mask keeps the patches that together
hold most of a query's attention (the paper's figure 2; DINO's masks).
"""

import argparse

import numpy as np

from beit_jax.config import check
from beit_jax.drawing.class_maps import sheet
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
    names, images = inputs.load_inputs(
        options.images, count=options.count, size=encoder.image_size, resize=options.resize
    )
    (output,) = encoder.blocks(images, (block,))
    size, side = encoder.image_size, encoder.image_size // encoder.grid
    colours = pca_colours(np.asarray(output.patches))
    colours = colours.repeat(side, axis=1).repeat(side, axis=2)
    query = inputs.patch_at(options.at, grid=encoder.grid)
    rows: dict[str, list[np.ndarray]] = {
        "image": list(images),
        "patch features": list(colours),
        f"class token, {options.share:.0%}": [],
        f"framed patch, {options.share:.0%}": [],
    }
    for image in images:
        weights = np.asarray(encoder.attention(image[None], (block,)))[0, 0].mean(axis=0)
        masks = [
            threshold_mask(query_map(weights, query=each), share=options.share)
            for each in (None, query)
        ]
        of_class, of_patch = (shaded(image, to_pixels(mask, image_size=size)) for mask in masks)
        rows[f"class token, {options.share:.0%}"].append(of_class)
        rows[f"framed patch, {options.share:.0%}"].append(
            inputs.framed(of_patch, query=query, grid=encoder.grid)
        )
    return [("segments", sheet(rows, names=(), titles=names))]
