"""What a model fills in: an image, its patches hidden, and what the predicted tokens decode to.

The columns: the image; what the encoder sees; hidden patches from the most likely tokens; the same
from tokens drawn from the prediction; the true tokens, which is the best that the tokenizer allows.
The tokens of visible patches are the true ones throughout.
"""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config import ConfigError, check
from beit_jax.drawing.figure import figure, shown_side
from beit_jax.drawing.sheets import hide_patches, to_uint8
from beit_jax.evaluation.reconstruction import fill_in
from beit_jax.features.command import add_checkpoint_options, checkpoint_facts
from beit_jax.pictures import bounds, inputs, masks
from beit_jax.pretrained import (
    PretrainedMaskedImageModel,
    PretrainedTokenizer,
    load_masked_image_model,
    load_tokenizer,
)
from beit_jax.types import Json
from beit_jax.weights import native

SUMMARY = "what a pre-trained model fills in: from predicted tokens and from the true ones"
_COLUMNS = (
    "original",
    "hidden patches",
    "the model's tokens, most likely",
    "the model's tokens, drawn",
    "true tokens",
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this picture."""
    option = command.add_argument
    inputs.add_options(command)
    masks.add_mask_options(command)
    option(
        "--weights", required=True, metavar="W", help="a pre-training run, or a checkpoint of it"
    )
    option(
        "--tokenizer",
        default="",
        metavar="T",
        help="a tokenizer's file, or the run that trained it (default: what the run names)",
    )
    option("--image-size", type=int, default=0, help="pixels (default: the checkpoint's)")
    add_checkpoint_options(command)


def draw(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture, named "reconstruct", with a row for each image: uint8 `[H, W, 3]`.

    Raises:
      ConfigError: the weights predict no tokens, the tokenizer does not fit them or can't paint, or
        something else does not fit.
    """
    with bounds.naming("--weights", options.weights):
        model = load_masked_image_model(
            options.weights,
            image_size=options.image_size or None,
            **checkpoint_facts(options),
        )
    tokenizer = painter(options.tokenizer or options.weights, grid=model.grid)
    check(
        tokenizer.vocabulary == model.vocabulary,
        "--tokenizer",
        f"it has {tokenizer.vocabulary} tokens, the model predicts {model.vocabulary}",
    )
    config = masks.mask_config(options, grid=model.grid, values=_run_masks(options, model=model))
    found = list(inputs.read_inputs(options))
    images, token_views = (
        np.stack([inputs.square_of(image, size=size, options=options) for _, image in found])
        for size in (model.image_size, tokenizer.image_size)
    )
    hidden = masks.draw_masks(config, count=len(found), grid=model.grid, seed=options.seed)
    return [
        (
            "reconstruct",
            reconstruction_picture(
                images,
                token_views,
                hidden,
                names=[name for name, _ in found],
                model=model,
                tokenizer=tokenizer,
                seed=options.seed,
                masking=masks.described(config),
            ),
        )
    ]


def reconstruction_picture(
    images: np.ndarray,
    token_views: np.ndarray,
    hidden: np.ndarray,
    *,
    names: list[str],
    model: PretrainedMaskedImageModel,
    tokenizer: PretrainedTokenizer,
    seed: int,
    masking: str,
) -> np.ndarray:
    """Draws the rows.

    Args:
      images: uint8 `[b, s, s, 3]`, of the model's size.
      token_views: uint8 `[b, t, t, 3]`, the same of the tokenizer's size.
      hidden: bool `[b, grid, grid]`.
      names: of the images.
      model, tokenizer: of one grid and one vocabulary.
      seed: of the tokens that are drawn.
      masking: how the masks were made, for the note.

    Returns:
      uint8 `[H, W, 3]`.
    """
    ids = tokenizer.encode(token_views)
    logits = model(images, hidden)
    likely = fill_in(logits, ids, jnp.asarray(hidden))
    drawn = fill_in(logits, ids, jnp.asarray(hidden), key=jax.random.key(seed))
    side = images.shape[1]
    decoded = [
        to_uint8(np.asarray(tokenizer.decode(each)), side=side) for each in (likely, drawn, ids)
    ]
    columns = [images, hide_patches(images, hidden), *decoded]
    right = [
        [
            float((np.asarray(each) == np.asarray(ids))[i][hidden[i]].mean())
            for each in (likely, drawn)
        ]
        for i in range(len(images))
    ]
    return figure(
        list(zip(*columns, strict=True)),
        title="What the model fills in",
        columns=_COLUMNS,
        labels=names,
        captions=[
            [
                "",
                f"{int(mask.sum())} of {mask.size} hidden",
                *(f"{share:.0%} of the hidden right" for share in shares),
                "",
            ]
            for mask, shares in zip(hidden, right, strict=True)
        ],
        note="Visible patches are decoded from their true tokens in every column. A token is right"
        f" where it is the tokenizer's, of {tokenizer.vocabulary:,}. Masks: {masking}.",
        cell=shown_side(side),
    ).pixels


def painter(source: str, *, grid: int) -> PretrainedTokenizer:
    """A tokenizer that can paint, for images of `grid` by `grid` tokens.

    Raises:
      ConfigError: there is none, it is gone, or it has no decoder; one line.
    """
    try:
        with bounds.naming("--tokenizer", source):
            tokenizer = load_tokenizer(source)
        if tokenizer.grid != grid:
            stride = tokenizer.image_size // tokenizer.grid
            tokenizer = load_tokenizer(source, image_size=grid * stride)
    except FileNotFoundError as error:
        # A quickstart that was moved as a whole has its tokenizer beside the run.
        beside = os.path.join(os.path.dirname(os.path.abspath(source)), "tokenizer")
        if os.path.isdir(source) and os.path.isdir(beside) and not os.path.samefile(source, beside):
            return painter(beside, grid=grid)
        said = " ".join(str(error).split())
        raise ConfigError(f"--tokenizer: {said}; add --tokenizer=FILE") from None
    check(tokenizer.paints, "--tokenizer", "it has no decoder, so that it can't paint its tokens")
    return tokenizer


def _run_masks(
    options: argparse.Namespace, *, model: PretrainedMaskedImageModel
) -> dict[str, Json] | None:
    """The masks that the run trained with; None where the weights don't say, or for other grids."""
    if not native.is_checkpoint(options.weights):
        return None
    saved = native.saved_config(options.weights)
    sizes = saved.get("model", {})
    if sizes.get("image_size", 0) != model.image_size:
        return None
    mask = saved.get("data", {}).get("mask")
    return dict(mask) if mask else None
