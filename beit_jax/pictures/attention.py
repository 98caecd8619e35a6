"""What tokens attend to: overlays and bare maps, of the mean of heads, rollout, and every head.

A row is a query: the class token, then points of the image, whose patch is framed.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from beit_jax.drawing.figure import figure, shown_side
from beit_jax.drawing.heat import heat, over, scale
from beit_jax.evaluation.attention_maps import query_map, rollout, to_pixels
from beit_jax.pictures import inputs
from beit_jax.pretrained import PretrainedEncoder

SUMMARY = "what the class token and chosen points attend to"
POINTS = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))
_BRIGHTEST = 99.0  # percentile of a map that has the brightest colour: one patch may outshine all


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this picture."""
    option = command.add_argument
    inputs.add_options(command)
    option(
        "--at",
        type=inputs.point,
        action="append",
        default=None,
        metavar="X,Y",
        help="a point whose patch asks, as shares of the sides; may be repeated (default: three)",
    )
    option("--block", type=int, default=-1, help="from 1, or from the last: -1 (default)")
    option("--per-head", action="store_true", help="adds a map of every head")


def draw(encoder: PretrainedEncoder, options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """A picture for each image: its name and uint8 `[H, W, 3]`.

    Raises:
      ConfigError: an image can't be read, or there is no such block.
    """
    layers = encoder.config.layers
    block = inputs.chosen_block(options.block, layers=layers)
    names, images = inputs.load_inputs(options, size=encoder.image_size)
    pictures = []
    for name, image in zip(names, images, strict=True):
        # One by one: all blocks of a large encoder have 90 MB for each image.
        weights = np.asarray(encoder.attention(image[None], range(1, layers + 1)))
        picture = attention_picture(
            image,
            weights[:, 0],
            block=block,
            points=options.at or POINTS,
            per_head=options.per_head,
            name=name,
        )
        pictures.append((name, picture))
    return pictures


def attention_picture(
    image: np.ndarray,
    weights: np.ndarray,
    *,
    block: int,
    points: Sequence[tuple[float, float]],
    per_head: bool,
    name: str,
) -> np.ndarray:
    """Draws one image's attention.

    Args:
      image: uint8 `[s, s, 3]`.
      weights: `[l, h, n, n]`, of all blocks.
      block: from 1, whose attention is shown; the rollout goes through all blocks up to it.
      points: (x, y) in 0..1.
      per_head: whether every head has a column.
      name: of the image.

    Returns:
      uint8 `[H, W, 3]`.
    """
    of_block = weights[block - 1]
    mean = of_block.mean(axis=0)
    rolled = rollout(weights[:block, None])[0]
    grid = query_map(mean, query=None).shape[0]
    columns = ["query", f"block {block}, bare", f"block {block}, mean of heads", "rollout"]
    if per_head:
        columns += [f"head {i}" for i in range(1, len(of_block) + 1)]
    rows, labels, captions = [], [], []
    for at in (None, *points):
        query = None if at is None else inputs.patch_at(at, grid=grid)
        asking = image
        if query is not None:
            asking = inputs.framed(image, query=query, grid=grid)
        labels.append(
            "the class token asks" if at is None else f"the patch at {at[0]:g}, {at[1]:g}"
        )
        maps = [query_map(each, query=query) for each in (mean, rolled)]
        if per_head:
            maps += [query_map(each, query=query) for each in of_block]
        tops = [float(np.percentile(each, _BRIGHTEST)) for each in maps]
        colours = [
            heat(to_pixels(each, image_size=image.shape[0]), largest=top)
            for each, top in zip(maps, tops, strict=True)
        ]
        rows.append([asking, colours[0], *(over(image, each) for each in colours)])
        captions.append(["", *(f"up to {top:.2%}" for top in (tops[0], *tops))])
    drawn = figure(
        rows,
        title=f"Attention: {name}",
        columns=columns,
        labels=labels,
        captions=captions,
        legend=scale("0", "the share below the map, or more"),
        note=f"How the query's attention is shared out over the patches; an even share is"
        f" {1 / of_block.shape[-1]:.2%}. The rollout goes through blocks 1 to {block}.",
        cell=shown_side(image.shape[0]),
    )
    return drawn.pixels
