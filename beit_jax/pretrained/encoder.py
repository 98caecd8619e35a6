"""The encoder: tokens of the last block, or of any block."""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import ModelConfig
from beit_jax.models.functional import Functional, functional
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import normalize
from beit_jax.pretrained.model import Array, Pretrained, check_images, check_mask
from beit_jax.types import Params
from beit_jax.weights.description import Description


class EncoderOutput(NamedTuple):
    """An encoder's tokens.

    Attributes:
      cls: the class token, `[b, d]`.
      patches: the patch tokens where they are in the image, `[b, grid, grid, d]`.
    """

    cls: jax.Array
    patches: jax.Array


class PretrainedEncoder(Pretrained):
    """A vision transformer without a head. `load_encoder` makes one."""

    @property
    def final_norm(self) -> bool:
        """Whether the checkpoint has a LayerNorm over its final tokens.

        Pre-trained encoders do, and so do classifiers of the class token. A classifier that pools
        the mean has a norm of the pooled vector instead, which is not applied to tokens.
        """
        return "norm" in self.params

    def __call__(self, images: Array) -> EncoderOutput:
        """Encodes images; compiled once per batch size.

        Args:
          images: uint8 `[b, s, s, 3]`, RGB, NumPy or JAX.

        Returns:
          float32 tokens of the last block, after the final norm where `final_norm` is true.

        Raises:
          ValueError: images of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        return _encode(
            self.params,
            images,
            functions=self.functions,
            normalization=self.normalization,
            grid=self.grid,
        )

    def blocks(
        self, images: Array, blocks: Sequence[int], *, norm: bool = False
    ) -> tuple[EncoderOutput, ...]:
        """The outputs of some blocks; compiled once per batch size and choice of blocks.

        Args:
          images: uint8 `[b, s, s, 3]`, RGB, NumPy or JAX.
          blocks: numbers from 1 (the first block) to the number of layers, negative ones that count
            from the last (-1), or 0 for the embeddings that the first block is given. Blocks after
            the last one asked for are not run.
          norm: apply the final norm to each output.

        Returns:
          float32 tokens, one output per number, in the order given. Block i is transformers'
          `hidden_states[i]`.

        Raises:
          ValueError: no such block, no final norm to apply, or images of another size or type.
        """
        check_images(images, image_size=self.image_size)
        numbers = _block_numbers(blocks, layers=self.config.layers)
        self._check_norm(norm)
        return _encode_blocks(
            self.params,
            images,
            functions=self.functions,
            normalization=self.normalization,
            grid=self.grid,
            blocks=numbers,
            norm=norm,
        )

    def attention(self, images: Array, blocks: Sequence[int] = (-1,)) -> jax.Array:
        """Attention weights of some blocks; compiled once per batch size and choice of blocks.

        Args:
          images: uint8 `[b, s, s, 3]`, RGB, NumPy or JAX.
          blocks: numbers from 1 (the first block) to the number of layers, or negative ones that
            count from the last (-1).

        Returns:
          float32 `[len(blocks), b, h, n, n]`, (query, key), n = 1 + grid² with the class token
          first; rows sum to one. Block i is transformers' `attentions[i - 1]`.
          `evaluation.attention_maps` makes maps of them.

        Raises:
          ValueError: no such block, or images of another size or type.
        """
        check_images(images, image_size=self.image_size)
        numbers = _block_numbers(blocks, layers=self.config.layers)
        if 0 in numbers:
            raise ValueError("blocks: 0 stands for the embeddings, which have no attention")
        return _attention(
            self.params,
            images,
            functions=self.functions,
            normalization=self.normalization,
            blocks=numbers,
        )

    def apply(
        self,
        params: Params,
        images: jax.Array,
        *,
        mask: jax.Array | None = None,
        drop_path_key: jax.Array | None = None,
    ) -> EncoderOutput:
        """The pure function behind the call, for your own `jit`, `grad` and shardings.

        Args:
          params: as `params` or `init` gives them.
          images: normalised, float `[b, s, s, 3]`.
          mask: bool `[b, grid, grid]` or `[b, grid²]`; true patches are replaced by the mask token.
          drop_path_key: randomness for drop path; None runs every branch.

        Returns:
          Tokens in the model's dtype, after the final norm where there is one.

        Raises:
          ValueError: a mask for an encoder without a mask token, one of another shape or type, or
            parameters that don't fit.
        """
        if mask is not None and "mask_token" not in params:
            raise ValueError("mask: this checkpoint has no mask token, so no patch can be hidden")
        if mask is not None:
            check_mask(mask, batch=images.shape[0], grid=self.grid)
        tokens = self.functions.apply(params, images, mask=mask, drop_path_key=drop_path_key)
        return _output(tokens, grid=self.grid)

    def apply_blocks(
        self, params: Params, images: jax.Array, blocks: Sequence[int], *, norm: bool = False
    ) -> tuple[EncoderOutput, ...]:
        """The pure function behind `blocks`, of normalised float images.

        Tokens come in the model's dtype: after the norm that of matmuls, else the residual's.
        """
        numbers = _block_numbers(blocks, layers=self.config.layers)
        self._check_norm(norm)
        return _apply_blocks(
            self.functions, params, images, grid=self.grid, blocks=numbers, norm=norm
        )

    def module(self) -> Encoder:
        """A bare NNX module with the parameters inside, for those who build with Flax.

        `module(normalised_images)` gives tokens `[b, 1 + grid², d]`, the class token first.
        """
        return nnx.merge(self.functions.graphdef, self.params)

    def _check_norm(self, norm: bool) -> None:
        if norm and not self.final_norm:
            raise ValueError(
                "norm: this checkpoint has no final norm (a classifier that pools the mean"
                " normalises the pooled vector instead)"
            )


def encoder_of(params: Params, description: Description) -> PretrainedEncoder:
    """The encoder with these parameters: what a whole model has under "encoder"."""
    functions = _encoder_functions(
        description.model, mask_token="mask_token" in params, final_norm="norm" in params
    )
    return PretrainedEncoder(params=params, description=description, functions=functions)


# Cached, so that models of the same sizes share their compiled functions, whichever is loaded.
@functools.cache
def _encoder_functions(config: ModelConfig, *, mask_token: bool, final_norm: bool) -> Functional:
    return functional(
        lambda rngs: Encoder(config, mask_token=mask_token, final_norm=final_norm, rngs=rngs)
    )


def _output(tokens: jax.Array, *, grid: int) -> EncoderOutput:
    b, _, d = tokens.shape
    return EncoderOutput(cls=tokens[:, 0], patches=tokens[:, 1:].reshape(b, grid, grid, d))


def _float32(output: EncoderOutput) -> EncoderOutput:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), output)


@functools.partial(jax.jit, static_argnames=("functions", "normalization", "grid"))
def _encode(
    params: Params, images: jax.Array, *, functions: Functional, normalization: str, grid: int
) -> EncoderOutput:
    tokens = functions.apply(params, normalize(images, kind=normalization))
    return _float32(_output(tokens, grid=grid))


@functools.partial(
    jax.jit, static_argnames=("functions", "normalization", "grid", "blocks", "norm")
)
def _encode_blocks(
    params: Params,
    images: jax.Array,
    *,
    functions: Functional,
    normalization: str,
    grid: int,
    blocks: tuple[int, ...],
    norm: bool,
) -> tuple[EncoderOutput, ...]:
    images = normalize(images, kind=normalization)
    outputs = _apply_blocks(functions, params, images, grid=grid, blocks=blocks, norm=norm)
    return tuple(_float32(output) for output in outputs)


@functools.partial(jax.jit, static_argnames=("functions", "normalization", "blocks"))
def _attention(
    params: Params,
    images: jax.Array,
    *,
    functions: Functional,
    normalization: str,
    blocks: tuple[int, ...],
) -> jax.Array:
    pixels = normalize(images, kind=normalization)
    return functions.apply(params, pixels, method="attention_weights", blocks=blocks)


def _apply_blocks(
    functions: Functional,
    params: Params,
    images: jax.Array,
    *,
    grid: int,
    blocks: tuple[int, ...],
    norm: bool,
) -> tuple[EncoderOutput, ...]:
    states = functions.apply(params, images, method="block_outputs", blocks=blocks)
    if norm:
        states = functions.apply(params, states, method="final_norm")
    return tuple(_output(tokens, grid=grid) for tokens in states)


def _block_numbers(blocks: Sequence[int], *, layers: int) -> tuple[int, ...]:
    """Block numbers from 0, negative ones resolved. Takes any sequence of integers, NumPy's too."""
    numbers = tuple(operator.index(block) for block in blocks)
    if not numbers or not all(-layers <= number <= layers for number in numbers):
        raise ValueError(
            f"blocks: {list(numbers)}; the encoder has blocks 1 to {layers}, or -{layers} to -1"
        )
    return tuple(number if number >= 0 else layers + 1 + number for number in numbers)
