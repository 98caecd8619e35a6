"""The tokenizer: its file is whole, and its tokens of held-out images say something."""

import math

import jax
import numpy as np

from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, skipped, warning, wrong
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.types import Params

_COLLAPSED = 0.5  # share of the most frequent token, as in tasks/token_statistics.py
_UNIFORM = 0.98  # of ln(vocabulary)
_ENOUGH = 10  # tokens per code, from which on a flat histogram is no accident
# Of the mean colours' error. The quickstart's tokenizer has 0.72 on its images and 0.54 on
# photographs; 0.9 with inputs scaled by 2 or 1/2.
_POOR = 0.85
_RESCALE = "the file's weights were made for another range of pixels, or are random: take another"


def check_tokenizer(context: Context) -> list[Finding]:
    """The tokenizer's file can be read and fits the settings."""
    config = context.config.tokenizer
    if context.untrained_tokenizer:
        return [ok("an earlier job of this config trains the tokenizer")]
    context.tokenizer_params  # noqa: B018  # raises what is wrong with it
    if config.random_weights:
        return [
            warning(
                "config.tokenizer.random_weights: its tokens mean nothing",
                "set config.tokenizer.path for anything but trying the machinery",
            )
        ]
    return [ok(f"{config.path} is whole and fits the settings")]


def check_tokens(context: Context) -> list[Finding]:
    """Tokens of held-out images are neither constant nor random."""
    config = context.config.tokenizer
    if context.untrained_tokenizer or config.random_weights:
        return [skipped("the tokenizer's weights are random: its tokens are not looked at")]
    batch = context.held_out
    images = context.batch["token_image"] if batch is None else batch["token_image"]
    if batch is not None:
        images = images[np.asarray(batch["valid"], bool)]
    if not len(images):
        return [skipped("there is no held-out image to tokenise")]
    return token_findings(open_tokenizer(config), context.tokenizer_params, images)


def token_findings(tokenizer: Tokenizer, params: Params, images: np.ndarray) -> list[Finding]:
    """Findings about the tokens of images.

    Args:
      tokenizer: its functions.
      params: its parameters.
      images: uint8 `[b, s, s, 3]`, of the tokenizer's size.
    """
    ids = np.asarray(jax.jit(tokenizer.encode)(tokenizer.encoding_params(params), images))
    findings = distribution(ids, vocabulary=tokenizer.vocabulary)
    if tokenizer.paints(params) and tokenizer.vocabulary > 1:
        painted = np.asarray(jax.jit(tokenizer.decode)(params, ids))
        findings += repainted(painted, images)
    return findings


def distribution(ids: np.ndarray, *, vocabulary: int) -> list[Finding]:
    """Findings about token ids `[b, h, w]` as a histogram, and as a picture."""
    counts = np.bincount(ids.ravel(), minlength=vocabulary)
    shares = counts[counts > 0] / counts.sum()
    entropy = float((shares * -np.log(shares)).sum())
    largest = math.log(vocabulary)
    what = (
        f"{counts.sum():,} tokens of {len(ids)} held-out images: {(counts > 0).sum()} of"
        f" {vocabulary} codes, entropy {entropy:.2f} of {largest:.2f} nats, the most frequent one"
        f" {shares.max():.0%}"
    )
    if shares.max() > _COLLAPSED:
        return [wrong(f"{what}: collapsed, nothing to learn", f"{_RESCALE}; or train a new one")]
    # Real images are smooth: neighbours share a token far more often than strangers do.
    neighbours = float(np.mean(ids[:, :, 1:] == ids[:, :, :-1])) if ids.shape[2] > 1 else 1.0
    by_chance = float(np.square(shares).sum())
    flat = entropy > _UNIFORM * largest and counts.sum() >= _ENOUGH * vocabulary
    if flat and neighbours < 2 * by_chance:
        return [
            wrong(
                f"{what}; neighbours agree in {neighbours:.1%}, by chance {by_chance:.1%}: noise",
                _RESCALE,
            )
        ]
    return [ok(what)]


def repainted(painted: np.ndarray, images: np.ndarray) -> list[Finding]:
    """Whether pictures made from the tokens are nearer to the images than their mean colours are.

    Args:
      painted: float32 `[b, s, s, 3]` in [0, 1].
      images: uint8, of the same shape.
    """
    wanted = images.astype(np.float32) / 255
    error = float(np.abs(painted - wanted).mean())
    plain = float(np.abs(wanted.mean((1, 2), keepdims=True) - wanted).mean())
    what = f"images painted from their tokens are off by {error:.3f}, their mean colours by"
    if error > plain:
        return [wrong(f"{what} {plain:.3f}: the tokens do not describe the images", _RESCALE)]
    if error > _POOR * plain:
        return [warning(f"{what} {plain:.3f}: the tokens hardly describe the images", _RESCALE)]
    return [ok(f"{what} {plain:.3f} (mean |Δ| of [0, 1])")]
