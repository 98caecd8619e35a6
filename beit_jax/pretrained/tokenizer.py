"""The tokenizer: images to token ids, and back."""

import dataclasses
import functools
import os
from typing import Annotated

import jax
import jax.numpy as jnp

from beit_jax.config import TokenizerConfig, parse
from beit_jax.json_text import JsonError, json_object
from beit_jax.pretrained.model import Array, check_images
from beit_jax.tokenizers.kinds import BY_KIND
from beit_jax.tokenizers.loading import (
    DIGEST_KEY,
    METADATA_KEY,
    TokenizerFileError,
    load_params,
    open_tokenizer,
)
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.types import Params
from beit_jax.weights import containers, native
from beit_jax.weights.report import WeightsError

# What a run that trains a tokenizer leaves in its directory.
_TOKENIZER_FILE = "tokenizer.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Named:
    """Settings of which one names the class of the others (`kinds.KINDS`)."""

    tokenizer: Annotated[TokenizerConfig, BY_KIND]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedTokenizer:
    """Images to a grid of token ids, and ids back to pixels. `load_tokenizer` makes one.

    Attributes:
      params: nested dict of float32 arrays.
      config: the tokenizer's kind and sizes.
      functions: the tokenizer's pure functions of `params`.
    """

    params: Params = dataclasses.field(repr=False)
    config: TokenizerConfig
    functions: Tokenizer = dataclasses.field(repr=False)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.functions.image_size

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.functions.grid

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.functions.vocabulary

    @property
    def paints(self) -> bool:
        """Whether `decode` works: a DALL-E file may lack the decoder."""
        return self.functions.paints(self.params)

    def encode(self, images: Array) -> jax.Array:
        """uint8 images `[b, s, s, 3]` → ids, int32 `[b, grid, grid]`; compiled once per batch size.

        Raises:
          ValueError: images of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        return _tokenize(self.params, images, functions=self.functions)

    def decode(self, ids: Array) -> jax.Array:
        """Ids, integers `[b, grid, grid]` → float32 pixels `[b, s, s, 3]` in [0, 1].

        Raises:
          ValueError: ids of another rank or type, or a tokenizer that can't paint.
        """
        return _paint(self.params, ids, functions=self.functions)


def load_tokenizer(
    source: str | os.PathLike[str], *, image_size: int | None = None, dtype: str = "auto"
) -> PretrainedTokenizer:
    """Loads a tokenizer; its kind and sizes are read from the file itself.

    Args:
      source: a tokenizer's `.safetensors` file; the directory of a run that trained a tokenizer; or
        that of a pre-training run, whose config names the tokenizer.
      image_size: of the images, in pixels; None: what the tokenizer was made for. The networks are
        convolutional: any multiple of the stride will do.
      dtype: of the convolutions: "auto" (bfloat16 on accelerators, float32 on CPU), "float32" or
        "bfloat16".

    Raises:
      ConfigError: no tokenizer there, or an image size that is no multiple of its stride.
      TokenizerFileError: the file is damaged.
      FileNotFoundError: the file that a pre-training run's config names is gone.
    """
    config = _tokenizer_config(os.fspath(source))
    config = dataclasses.replace(config, dtype=dtype, image_size=image_size or config.image_size)
    params = jax.tree.map(jnp.asarray, load_params(config, name="tokenizer"))
    return PretrainedTokenizer(params=params, config=config, functions=open_tokenizer(config))


@functools.partial(jax.jit, static_argnames="functions")
def _tokenize(params: Params, images: jax.Array, *, functions: Tokenizer) -> jax.Array:
    return functions.encode(params, images)


@functools.partial(jax.jit, static_argnames="functions")
def _paint(params: Params, ids: jax.Array, *, functions: Tokenizer) -> jax.Array:
    return functions.decode(params, ids)


def _tokenizer_config(source: str) -> TokenizerConfig:
    """The settings of the tokenizer that a file, or the directory of a run, holds or names."""
    if os.path.exists(os.path.join(source, _TOKENIZER_FILE)):
        source = os.path.join(source, _TOKENIZER_FILE)
    elif native.is_checkpoint(source):
        saved = native.saved_config(source)
        if saved.get("task") == "tokenizer":
            raise WeightsError(f"{source} lacks {_TOKENIZER_FILE}, which a run writes at its end")
        if saved.get("task") != "pretrain":
            raise WeightsError(f"{source} is a run that names no tokenizer ({saved.get('task')})")
        return parse(_Named, {"tokenizer": saved["tokenizer"]}, path=source).tokenizer
    _, metadata = containers.load_safetensors(containers.read_bytes(source), source=source)
    try:
        settings = json_object(metadata.get(METADATA_KEY, ""), path=source)
    except JsonError:
        raise TokenizerFileError(
            f"{source} is a safetensors file, but its metadata does not say which tokenizer it"
            " holds; DALL-E's weights are converted with `beit-jax convert-tokenizer`"
        ) from None
    settings.pop(DIGEST_KEY, None)  # `load_params` compares it
    return parse(_Named, {"tokenizer": {**settings, "path": source}}, path=source).tokenizer
