"""The DALL-E discrete VAE, the tokenizer BEiT was trained with. Inference only.

Architecture and pixel maps: openai/DALL-E `dall_e/{encoder,decoder,utils}.py` (MIT licence), in
channels-last layout. Parameters are named after the original's:

    {"encoder": {"input": {"kernel", "bias"},
                 "group_2": {"block_1": {"conv_1": ..., "conv_4": ..., "identity": ...}, ...},
                 "output": ...},
     "decoder": {... the same ...}}

Kernels are `[height, width, in, out]`: an original weight `[out, in, height, width]` transposed by
(2, 3, 1, 0).

    tokenizer = dalle_tokenizer(DalleConfig(random_weights=True))
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import TokenizerConfig, check, shape_setting
from beit_jax.config.bounds import Name, Within
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.functional import Functional, functional
from beit_jax.tokenizers.tokenizer import Tokenizer, scores
from beit_jax.types import Params

GROUPS = 4
BLOCKS_PER_GROUP = 2
LAST_BLOCK = f"group_{GROUPS}/block_{BLOCKS_PER_GROUP}"
POST_GAIN = 1 / (GROUPS * BLOCKS_PER_GROUP) ** 2  # original: 1 / n_layers ** 2
LOGIT_LAPLACE_EPSILON = 0.1
HOW_TO_GET = (
    "get DALL-E's weights with `wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl` "
    "and `wget -O decoder.pkl https://cdn.openai.com/dall-e/decoder.pkl`, and convert them "
    "with `python -m beit_jax.weights convert-tokenizer`; or train a tokenizer of your own "
    "with configs/dvae.py"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DalleConfig(TokenizerConfig):
    """The DALL-E discrete VAE (openai/DALL-E): stride 8, and 8192 tokens as published."""

    kind: Name = shape_setting("dalle")
    # Hidden channels; dall_e/encoder.py: n_hid.
    width: Annotated[int, Within(ge=4, le=65_536)] = shape_setting(256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width % 4 == 0, "width", f"must be a multiple of 4, got {self.width}")

    @property
    def stride(self) -> int:
        """Three poolings by 2."""
        return 8


def _kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """N(0, 1 / fan_in), as dall_e/utils.py's Conv2d; biases are 0.

    Drawn flat: the same numbers, but XLA takes a quarter of the time to compile the draw.
    """
    *fan_in, _ = shape
    values = jax.random.normal(key, (math.prod(shape),), dtype)
    return values.reshape(shape) / math.sqrt(math.prod(fan_in))


def map_pixels(pixels: jax.Array) -> jax.Array:
    """[0, 1] -> [0.1, 0.9], the range of the logit-Laplace likelihood. Any shape, float."""
    return (1 - 2 * LOGIT_LAPLACE_EPSILON) * pixels + LOGIT_LAPLACE_EPSILON


def unmap_pixels(mapped: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((mapped - LOGIT_LAPLACE_EPSILON) / (1 - 2 * LOGIT_LAPLACE_EPSILON), 0, 1)


def _conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    dtype: jnp.dtype,
    precision: jax.lax.PrecisionLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Stride 1, zero padding (size - 1) / 2, float32 parameters, computed in `dtype`."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        padding="SAME",
        dtype=dtype,
        param_dtype=jnp.float32,
        precision=precision,  # type: ignore[arg-type]  # nnx's annotation lacks DotAlgorithm
        kernel_init=_kernel_init,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Pre-activation bottleneck: identity(x) + post_gain × four convolutions of width out/4."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        sizes: tuple[int, int, int, int],
        dtype: jnp.dtype,
        precision: jax.lax.PrecisionLike,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, precision=precision, rngs=rngs)
        hidden = outputs // 4
        self.conv_1 = conv(inputs, hidden, sizes[0])
        self.conv_2 = conv(hidden, hidden, sizes[1])
        self.conv_3 = conv(hidden, hidden, sizes[2])
        self.conv_4 = conv(hidden, outputs, sizes[3])
        if inputs != outputs:
            self.identity = conv(inputs, outputs, 1)
        self.widens = inputs != outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` -> `[b, h, w, out]`."""
        residual = x
        for conv in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
            residual = conv(nnx.relu(residual))
        identity = self.identity(x) if self.widens else x
        return identity + POST_GAIN * residual


class Group(nnx.Module):
    """`BLOCKS_PER_GROUP` blocks of one width and resolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        sizes: tuple[int, int, int, int],
        dtype: jnp.dtype,
        precision: jax.lax.PrecisionLike,
        rngs: nnx.Rngs,
    ):
        block_of = functools.partial(
            Block, sizes=sizes, dtype=dtype, precision=precision, rngs=rngs
        )
        for index in range(1, BLOCKS_PER_GROUP + 1):
            block = block_of(inputs if index == 1 else outputs, outputs)
            setattr(self, f"block_{index}", block)

    def outputs(self, x: jax.Array) -> dict[str, jax.Array]:
        """Every block's output, by the block's name, in order."""
        results = {}
        for index in range(1, BLOCKS_PER_GROUP + 1):
            x = results[f"block_{index}"] = getattr(self, f"block_{index}")(x)
        return results


class Encoder(nnx.Module):
    """Images -> token logits, at an eighth of the resolution."""

    def __init__(
        self,
        *,
        width: int = 256,
        vocabulary: int = 8192,
        dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, precision=precision, rngs=rngs)
        group_of = functools.partial(
            Group, sizes=(3, 3, 3, 1), dtype=dtype, precision=precision, rngs=rngs
        )
        self.input = conv(3, width, 7)
        channels = width
        for index in range(1, GROUPS + 1):
            outputs = width * 2 ** (index - 1)
            setattr(self, f"group_{index}", group_of(channels, outputs))
            channels = outputs
        # The original keeps this one convolution in float32 when the others are float16.
        self.output = conv(channels, vocabulary, 1, dtype=jnp.float32)

    def stages(self, images: jax.Array) -> dict[str, jax.Array]:
        """All intermediate outputs by parameter name ("input", "group_1/block_1", ...).

        Args:
          images: `[b, s, s, 3]` float32, after `map_pixels`; s a multiple of 8.

        Returns:
          Name -> `[b, h, w, channels]`, in the order of computation and before pooling. "output"
          is last: the logits, float32 `[b, s/8, s/8, vocabulary]`. Under jit, unused outputs are
          not computed.
        """
        results = self._blocks(images)
        return results | {"output": self.logits(nnx.relu(results[LAST_BLOCK]))}

    def features(self, images: jax.Array) -> jax.Array:
        """The last hidden layer, from which each position's logits are computed.

        Args:
          images: as for `stages`.

        Returns:
          `[b, s/8, s/8, channels]`, not negative, in the convolutions' dtype.
        """
        return nnx.relu(self._blocks(images)[LAST_BLOCK])

    def logits(self, features: jax.Array) -> jax.Array:
        """`features` of any positions, `[..., channels]` -> float32 `[..., vocabulary]`."""
        return scores(self.output, features)

    def _blocks(self, images: jax.Array) -> dict[str, jax.Array]:
        x = self.input(images)
        results = {"input": x}
        for index in range(1, GROUPS + 1):
            blocks = getattr(self, f"group_{index}").outputs(x)
            results |= {f"group_{index}/{name}": output for name, output in blocks.items()}
            x = blocks[f"block_{BLOCKS_PER_GROUP}"]
            if index < GROUPS:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return results

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[b, s, s, 3]` float32, after `map_pixels` -> logits float32 `[b, s/8, s/8, v]`."""
        return self.stages(images)["output"]


class TokenConv(nnx.Module):
    """A 1×1 convolution of one-hot tokens, done as a lookup of the kernel's rows.

    One-hot vectors of a 14×14 grid and 8192 tokens would be 6.4 MB an image.
    """

    def __init__(self, vocabulary: int, outputs: int, *, rngs: nnx.Rngs):
        shape = (1, 1, vocabulary, outputs)
        self.kernel = nnx.Param(_kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[b, h, w]` integers -> float32 `[b, h, w, out]`; NaN where an id does not exist."""
        return jnp.take(self.kernel[0, 0], ids, axis=0) + self.bias[...]


class Decoder(nnx.Module):
    """Token ids -> the parameters of a logit-Laplace distribution, at 8 times the resolution."""

    def __init__(
        self,
        *,
        width: int = 256,
        vocabulary: int = 8192,
        dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, precision=precision, rngs=rngs)
        group_of = functools.partial(
            Group, sizes=(1, 3, 3, 3), dtype=dtype, precision=precision, rngs=rngs
        )
        channels = width // 2  # original: n_init = 128 with n_hid = 256
        self.input = TokenConv(vocabulary, channels, rngs=rngs)  # always float32
        for index in range(1, GROUPS + 1):
            outputs = width * 2 ** (GROUPS - index)
            setattr(self, f"group_{index}", group_of(channels, outputs))
            channels = outputs
        self.output = conv(channels, 6, 1)

    def stages(self, ids: jax.Array) -> dict[str, jax.Array]:
        """All intermediate outputs, as `Encoder.stages`.

        Args:
          ids: integers `[b, h, w]`.

        Returns:
          Name -> `[b, height, width, channels]`, before upsampling. "output" is last: float32
          `[b, 8h, 8w, 6]`, three logit means and three log scales.
        """
        x = self.input(ids)
        results = {"input": x}
        for index in range(1, GROUPS + 1):
            blocks = getattr(self, f"group_{index}").outputs(x)
            results |= {f"group_{index}/{name}": output for name, output in blocks.items()}
            x = blocks[f"block_{BLOCKS_PER_GROUP}"]
            if index < GROUPS:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # nearest neighbour
        results["output"] = self.output(nnx.relu(x)).astype(jnp.float32)
        return results

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[b, h, w]` integers -> float32 `[b, 8h, 8w, 6]`."""
        return self.stages(ids)["output"]


def dalle_networks(
    config: DalleConfig, *, precision: jax.lax.PrecisionLike = None
) -> dict[str, Functional]:
    """The networks that `config` describes.

    Args:
      config: its `width`, `vocabulary` and `dtype` are used.
      precision: of the convolutions. None on TPU means one bfloat16 pass, even for float32 inputs.

    Returns:
      "encoder" and "decoder", each with its own parameters.
    """
    dtype = compute_dtype(config)

    def encoder(rngs: nnx.Rngs) -> Encoder:
        return Encoder(
            width=config.width,
            vocabulary=config.vocabulary,
            dtype=dtype,
            precision=precision,
            rngs=rngs,
        )

    def decoder(rngs: nnx.Rngs) -> Decoder:
        return Decoder(
            width=config.width,
            vocabulary=config.vocabulary,
            dtype=dtype,
            precision=precision,
            rngs=rngs,
        )

    return {"encoder": functional(encoder), "decoder": functional(decoder)}


def dalle_tokenizer(config: DalleConfig, *, precision: jax.lax.PrecisionLike = None) -> Tokenizer:
    """The DALL-E discrete VAE as a tokenizer.

    Args:
      config: the settings.
      precision: of the convolutions, as for `dalle_networks`.

    Returns:
      The functions. Their params are {"encoder": ..., "decoder": ...}; the decoder may be missing.
    """
    networks = dalle_networks(config, precision=precision)

    def init(key: jax.Array) -> Params:
        keys = dict(zip(networks, jax.random.split(key, len(networks)), strict=True))
        return {name: network.init(keys[name]) for name, network in networks.items()}

    def pixel_features(params: Params, pixels: jax.Array) -> jax.Array:
        return networks["encoder"].apply(params["encoder"], map_pixels(pixels), method="features")

    def feature_logits(params: Params, features: jax.Array) -> jax.Array:
        return networks["encoder"].apply(params["encoder"], features, method="logits")

    def pixel_decode(params: Params, ids: jax.Array) -> jax.Array:
        output = networks["decoder"].apply(params["decoder"], ids)
        return unmap_pixels(nnx.sigmoid(output[..., :3]))

    return Tokenizer(
        vocabulary=config.vocabulary,
        image_size=config.image_size,
        grid=config.grid,
        init=init,
        encoding_params=lambda params: {"encoder": params["encoder"]},
        pixel_features=pixel_features,
        feature_logits=feature_logits,
        pixel_decode=pixel_decode,
        decoding_parts=("decoder",),
        cannot_decode="convert decoder.pkl together with encoder.pkl to get pictures",
    )
