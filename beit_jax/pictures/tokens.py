"""The codebook as it is used on the images: how often each token occurs, and what it looks like.

A healthy codebook has many tokens in use, none of them most of the image. The patches show what the
most frequent tokens stand for: each in its surroundings, framed.
"""

import argparse
import dataclasses
import math

import numpy as np

from beit_jax.drawing.chart import falling
from beit_jax.drawing.figure import figure
from beit_jax.drawing.heat import marked
from beit_jax.drawing.text import PAPER
from beit_jax.pictures import bounds, inputs
from beit_jax.pretrained import PretrainedTokenizer
from beit_jax.pretrained import load_tokenizer as load
from beit_jax.progress import Progress

SUMMARY = "the codebook as used: frequencies, tokens never used, patches of the most frequent"
_CODES, _PATCHES = 12, 8
_CELL = 72  # pixels of a patch with its surroundings
_AROUND = 1  # patches around the one that is meant
_BATCH = 16
_SIDE = 24  # pixels of a patch at least, so that photographs' patches are sharp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """How a codebook is used.

    Attributes:
      counts: int64 `[v]`, how often each token occurs.
    """

    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """float64 `[v]`, which sum to 1."""
        shares: np.ndarray = self.counts / self.counts.sum()
        return shares

    @property
    def used(self) -> int:
        """Tokens that occur."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Of the distribution, in nats."""
        shares = self.shares[self.counts > 0]
        return float(-(shares * np.log(shares)).sum())


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of this picture."""
    option = command.add_argument
    inputs.add_options(command, count=200)
    option(
        "--weights",
        required=True,
        metavar="T",
        help="a tokenizer's file, the run that trained it, or a pre-training run",
    )
    option("--image-size", type=int, default=0, help="pixels (default: the tokenizer's)")


def draw(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """One picture, named "tokens": uint8 `[H, W, 3]`.

    Raises:
      ConfigError: there is no such tokenizer, or an image can't be read.
    """
    with bounds.naming("--weights", options.weights):
        tokenizer = load(options.weights, image_size=options.image_size or None)
    stride = tokenizer.image_size // tokenizer.grid
    shown_size = tokenizer.image_size * max(1, -(-_SIDE // stride))
    small, shown = [], []
    progress = Progress(options.count)
    for _, image in inputs.read_inputs(options):
        small.append(inputs.square_of(image, size=tokenizer.image_size, options=options))
        shown.append(inputs.square_of(image, size=shown_size, options=options))
        progress.update(len(small))
    progress.finish()
    ids = encoded(tokenizer, np.stack(small))
    picture = tokens_picture(np.stack(shown), ids, vocabulary=tokenizer.vocabulary)
    return [("tokens", picture)]


def encoded(tokenizer: PretrainedTokenizer, images: np.ndarray) -> np.ndarray:
    """The tokens of images, uint8 `[b, s, s, 3]`, made in batches: int32 `[b, grid, grid]`."""
    size = min(_BATCH, len(images))
    parts = []
    for start in range(0, len(images), size):
        # The last batch is filled up, since another size would compile again.
        chosen = np.arange(start, start + size) % len(images)
        parts.append(np.asarray(tokenizer.encode(images[chosen])))
    return np.concatenate(parts)[: len(images)]


def tokens_picture(images: np.ndarray, ids: np.ndarray, *, vocabulary: int) -> np.ndarray:
    """Draws the frequencies and the patches.

    Args:
      images: uint8 `[b, s, s, 3]`; s is a multiple of the grid.
      ids: int `[b, grid, grid]`, their tokens.
      vocabulary: how many tokens there are.

    Returns:
      uint8 `[H, W, 3]`.
    """
    usage = Usage(counts=np.bincount(ids.reshape(-1), minlength=vocabulary))
    most = np.argsort(-usage.counts, kind="stable")[: min(_CODES, usage.used)]
    rows = [_examples(images, ids, code=int(code)) for code in most]
    chance = math.log(vocabulary)
    top = usage.shares.max()
    return figure(
        rows,
        title=f"{usage.used:,} of {vocabulary:,} tokens occur in {len(images):,} images",
        chart=falling(
            usage.shares[usage.counts > 0],
            width=_PATCHES * (_CELL + 8) - 8,
            level=1 / vocabulary,
            level_name="if all were used alike",
            x_name="tokens, the most frequent first",
            y_name="how often a token occurs",
        ),
        labels=[f"token {code}: {usage.shares[code]:.2%} of all" for code in most],
        note=f"Entropy {usage.entropy:.3f} nats, {usage.entropy / chance:.0%} of the largest"
        f" possible, ln({vocabulary}) = {chance:.3f}; the most frequent token is {top:.1%} of all."
        f" {vocabulary - usage.used:,} tokens never occur among these {ids.size:,}; few images"
        " can't hold them all. Patches are framed within their surroundings.",
        cell=_CELL,
    ).pixels


def _examples(images: np.ndarray, ids: np.ndarray, *, code: int) -> list[np.ndarray]:
    """Patches that have a token, framed, evenly spread over those that there are."""
    found = np.argwhere(ids == code)
    # The middles of equal parts: the first and the last image would show in every row.
    middles = (np.arange(_PATCHES) + 0.5) * len(found) / _PATCHES
    chosen = found[np.unique(middles.astype(int))]
    size = images.shape[1]
    side = size // ids.shape[1]
    around = _AROUND * side
    patches = []
    for image, row, column in chosen:
        wide = np.full((size + 2 * around, size + 2 * around, 3), PAPER, np.uint8)
        wide[around:-around, around:-around] = images[image]
        top, left = row * side, column * side
        part = wide[top : top + side + 2 * around, left : left + side + 2 * around]
        inner = (around - 1, around - 1, around + side + 1, around + side + 1)
        patches.append(marked(part, box=inner))
    return patches
