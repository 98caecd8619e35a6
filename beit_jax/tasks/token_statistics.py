"""The distribution of held-out tokens: baselines for the loss of pre-training."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from beit_jax import progress
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.types import HostBatch, JsonObject, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Statistics of the masked tokens of held-out images; no model is involved.

    Attributes:
      entropy: of the tokens' distribution, in nats: the loss of a model that ignores the image.
      majority_accuracy: of always predicting the most frequent token.
      chance_loss: ln(vocabulary).
      codes_used: token ids that occur.
      tokens: masked tokens counted.
    """

    entropy: float
    majority_accuracy: float
    chance_loss: float
    codes_used: int
    tokens: int


def token_statistics(
    tokenizer: Tokenizer, params: Params, batches: Iterable[HostBatch]
) -> TokenStatistics | None:
    """Counts the masked tokens of held-out images.

    Args:
      tokenizer: turns images into token ids.
      params: its parameters.
      batches: this host's held-out images, with `token_image`, `mask` and `valid`.

    Returns:
      The statistics over all hosts; None without held-out images.
    """
    encode = jax.jit(tokenizer.encode)
    encoder_params = tokenizer.encoding_params(params)
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    shown = progress.over(
        batches,
        doing="counting tokens of held-out images (this host's)",
        size=lambda batch: len(batch["mask"]),
        shown=jax.process_index() == 0,
    )
    for batch in shown:
        ids = np.asarray(encode(encoder_params, batch["token_image"]))
        hidden = batch["mask"].astype(bool) & batch["valid"].astype(bool)[:, None, None]
        counts += np.bincount(ids[hidden], minlength=tokenizer.vocabulary)
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(counts).sum(axis=0)
    total = counts.sum()
    if total == 0:
        return None
    shares = counts[counts > 0] / total
    return TokenStatistics(
        entropy=float(-(shares * np.log(shares)).sum()),
        majority_accuracy=float(shares.max()),
        chance_loss=math.log(tokenizer.vocabulary),
        codes_used=int((counts > 0).sum()),
        tokens=int(total),
    )


def baselines(statistics: TokenStatistics | None) -> JsonObject:
    """What to compare loss and accuracy with, as `start.json` and `summary.json` have it."""
    return {
        "token_entropy": statistics.entropy if statistics else None,
        "majority_accuracy": statistics.majority_accuracy if statistics else None,
        "chance_loss": statistics.chance_loss if statistics else None,
        "codes_used": statistics.codes_used if statistics else None,
    }


def log_expectations(
    statistics: TokenStatistics | None, *, vocabulary: int, reference: str = ""
) -> None:
    """Logs the losses to compare with, and an error where the tokens look broken.

    Args:
      statistics: of held-out tokens, where there are any.
      vocabulary: of the tokenizer.
      reference: what a published run reached; "" for none.
    """
    logging.info(
        "chance: loss ln(%d) = %.3f, accuracy %.2g",
        vocabulary,
        math.log(vocabulary),
        1 / vocabulary,
    )
    if statistics is not None:
        logging.info(
            "held-out tokens: entropy %.3f nats (the loss of a model that ignores the image), the"
            " most frequent one is %.2f %% of %d; %d of %d codes occur",
            statistics.entropy,
            100 * statistics.majority_accuracy,
            statistics.tokens,
            statistics.codes_used,
            vocabulary,
        )
        if statistics.majority_accuracy > 0.5:
            logging.error(
                "ONE TOKEN IS %.0f %% OF ALL: the tokenizer has collapsed, or its input is not"
                " what it was trained on. There is nothing to learn from these tokens.",
                100 * statistics.majority_accuracy,
            )
    if reference:
        logging.info("published reference: %s", reference)
