"""The table of tokenizer kinds: to add one is to write its file and to add its row.

    KINDS["toy"] = TokenizerKind(config=ToyConfig, open=toy_tokenizer, how_to_get="draw some")

`config.tokenizer.kind` picks the row, and the row says the rest: which settings the section has,
how the tokenizer is opened, and what it can do. No other code tests for a kind by name. Code
outside this package may add a row before a config is parsed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax

from beit_jax.config import Choice, TokenizerConfig
from beit_jax.models.functional import Functional
from beit_jax.tokenizers import dalle, dvae
from beit_jax.tokenizers.tokenizer import Tokenizer

# A kind's functions take the config class that its row names: some subclass of TokenizerConfig.
KindConfig: TypeAlias = Any


class OpenTokenizer(Protocol):
    """Makes a kind's pure functions; reads no file."""

    def __call__(
        self, config: KindConfig, /, *, precision: jax.lax.PrecisionLike = None
    ) -> Tokenizer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What `tasks/tokenizer.py` needs to train a kind with Gumbel-softmax.

    Attributes:
      network: config -> functions with the methods `gumbel_forward` (`dvae.DiscreteVAE`'s),
        `logits` and `decode`. Their params are the tokenizer's. They may have variables, which
        `gumbel_forward` updates; the tokenizer's params are then `tokenizer.join` of both.
      normalize: pixels in [0, 1] -> the range in which the network reads and paints them.
    """

    network: Callable[[KindConfig], Functional]
    normalize: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """A kind of tokenizer.

    Attributes:
      config: the dataclass of its settings; its `stride` says how many pixels a token is wide, and
        the settings declared with `shape_setting` are those that a file must agree on.
      open: config -> `Tokenizer`.
      how_to_get: what to do where there are no weights; the end of a message.
      paints: whether it can turn tokens into images at all (`Tokenizer.paints` says whether it can
        with the weights at hand).
      optional: entries of params that a file may lack.
      training: None for a kind that `tasks/tokenizer.py` cannot train.
    """

    config: type[TokenizerConfig]
    open: OpenTokenizer
    how_to_get: str
    paints: bool = True
    optional: tuple[str, ...] = ()
    training: Training | None = None


KINDS: dict[str, TokenizerKind] = {
    "dalle": TokenizerKind(
        config=dalle.DalleConfig,
        open=dalle.dalle_tokenizer,
        how_to_get=dalle.HOW_TO_GET,
        optional=("decoder",),
    ),
    "dvae": TokenizerKind(
        config=dvae.DvaeConfig,
        open=dvae.dvae_tokenizer,
        how_to_get=dvae.HOW_TO_GET,
        training=Training(network=dvae.discrete_vae, normalize=dvae.normalize),
    ),
}

# For the field of a job's config: `tokenizer: Annotated[TokenizerConfig, BY_KIND]`.
BY_KIND = Choice("kind", KINDS)


def training(config: TokenizerConfig) -> Training:
    """How a tokenizer of this kind is trained.

    Raises:
      ValueError: it is not.
    """
    kind = KINDS[config.kind]
    if kind.training is None:
        raise ValueError(f"a tokenizer of kind {config.kind!r} cannot be trained here")
    return kind.training


def trainable() -> tuple[str, ...]:
    """The kinds that `tasks/tokenizer.py` can train."""
    return tuple(name for name, kind in KINDS.items() if kind.training is not None)
