"""A discrete VAE to train on one's own images, where DALL-E's tokenizer does not fit them.

Architecture and losses: unilm `beit/modeling_discrete_vae.py`, "customized", which
follows lucidrains/DALLE-pytorch; no weights were released. Parameters:

    {"encoder": {"level_1": {"resample": {"kernel", "bias"}, "conv_1": ..., "conv_3": ...}, ...,
                 "output": ...},
     "codebook": [vocabulary, codebook_width],
     "decoder": {... as the encoder ...}}

A training step:

    vae = discrete_vae(config)
    inputs = normalize(images / 255)
    output = vae.apply(params, inputs, method="gumbel_forward", key=key, temperature=0.9)
    loss = reconstruction_loss(output.reconstruction, inputs)
    loss += kl_weight * kl_to_uniform(output.logits).mean()

The same params serve `dvae_tokenizer(config)`.
"""

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from beit_jax.config import TokenizerConfig, check, one_of, shape_setting
from beit_jax.config.bounds import Name, Within
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.functional import Functional, functional
from beit_jax.tokenizers.tokenizer import Tokenizer, scores
from beit_jax.types import Params

HOW_TO_GET = "train one with `python main.py --config=configs/dvae.py`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DvaeConfig(TokenizerConfig):
    """The discrete VAE of `modeling_discrete_vae.py`, trained with `tasks/tokenizer.py`.

    Defaults: unilm's `utils.get_d_vae` (8192 tokens of 112 pixels, 3 levels).
    """

    kind: Name = shape_setting("dvae")
    width: Annotated[int, Within(ge=4, le=65_536)] = shape_setting(256)  # hidden channels
    levels: Annotated[int, Within(ge=1, le=10)] = shape_setting(3)  # halvings of the resolution
    codebook_width: Annotated[int, Within(ge=1, le=65_536)] = shape_setting(512)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width % 4 == 0, "width", f"must be a multiple of 4, got {self.width}")

    @property
    def stride(self) -> int:
        """Every level halves the resolution."""
        return int(2**self.levels)


class GumbelOutput(NamedTuple):
    """The result of a training forward pass.

    Attributes:
      reconstruction: float32 `[b, s, s, 3]`, in the inputs' normalised range.
      logits: float32 `[b, h, w, vocabulary]`, without the Gumbel noise.
    """

    reconstruction: jax.Array
    logits: jax.Array


def normalize(pixels: jax.Array) -> jax.Array:
    """[0, 1] -> [-1, 1], mean 0.5 and standard deviation 0.5 (`datasets.py:54-61`). Any shape."""
    return (pixels - 0.5) / 0.5


def denormalize(normalized: jax.Array) -> jax.Array:
    """The inverse of `normalize`, clipped to [0, 1]."""
    return jnp.clip(normalized * 0.5 + 0.5, 0, 1)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL divergence of every position's token distribution from the uniform distribution.

    The official code sums this over the batch and the positions (its `batchmean` divides by the
    length of the uniform vector's first axis, which is 1), so that its weight depends on the batch
    and the image size. Take `.sum()` for the official loss; the weights of this project's configs
    are for `.mean()`.

    Args:
      logits: `[..., vocabulary]`.

    Returns:
      float32 `[...]`, in nats, between 0 and ln(vocabulary).
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    excess = log_probabilities + math.log(logits.shape[-1])
    return jnp.sum(jnp.exp(log_probabilities) * excess, axis=-1)


def reconstruction_loss(
    reconstruction: jax.Array, inputs: jax.Array, *, kind: str = "mse"
) -> jax.Array:
    """Mean error over all pixels and channels, in the normalised range.

    Args:
      reconstruction: `[b, s, s, 3]`.
      inputs: the same shape.
      kind: "mse"; "smooth_l1", which is quadratic below 1 and linear above; or "l1", the mean
        absolute error that the paper reports (appendix C: 0.0880, DALL-E's 0.0856).

    Returns:
      float32 scalar.

    Raises:
      ConfigError: another `kind`.
    """
    one_of(kind, "kind", "mse", "smooth_l1", "l1")
    error = jnp.abs(reconstruction.astype(jnp.float32) - inputs.astype(jnp.float32))
    if kind == "mse":
        return jnp.mean(jnp.square(error))
    if kind == "smooth_l1":
        return jnp.mean(jnp.where(error < 1, 0.5 * jnp.square(error), error - 0.5))
    return jnp.mean(error)


class Doubling(nnx.Module):
    """PyTorch's `ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)`.

    Written as one matrix product, which computes four output pixels from every 2 × 2 neighbourhood,
    followed by an interleaving. XLA's convolution of a dilated input multiplies by the inserted
    zeros, and on CPU its gradient is tens of times slower than this one's.

    The kernel is `[4, 4, in, out]`, not flipped: a PyTorch weight `[in, out, h, w]` is flipped
    along h and w and transposed by (2, 3, 0, 1).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: jnp.dtype,
        precision: jax.lax.PrecisionLike,
        rngs: nnx.Rngs,
    ):
        # PyTorch takes the second axis of the weight, the outputs, for the fan-in.
        init = _torch_init(16 * outputs)
        self.kernel = nnx.Param(init(rngs.params(), (4, 4, inputs, outputs)))
        self.bias = nnx.Param(init(rngs.params(), (outputs,)))
        self.dtype = dtype
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` -> `[b, 2h, 2w, out]`."""
        _, h, w, _ = x.shape
        # Row 2h + a of the output sees rows h + a - 1 and h + a of the input, through rows a and
        # 2 + a of the kernel.
        kernel = rearrange(self.kernel[...], "(t a) (u c) i o -> (t u i) (a c o)", a=2, c=2)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [x[:, t : t + h + 1, u : u + w + 1] for t in range(2) for u in range(2)]
        y = jnp.matmul(
            jnp.concatenate(patches, axis=-1), kernel.astype(self.dtype), precision=self.precision
        )
        y = rearrange(y, "b h w (a c o) -> b h w a c o", a=2, c=2)
        rows = [
            jnp.stack([y[:, a : a + h, c : c + w, a, c] for c in range(2)], axis=3)
            for a in range(2)
        ]
        y = rearrange(jnp.stack(rows, axis=2), "b h a w c o -> b (h a) (w c) o")
        return y + self.bias.astype(self.dtype)


class Level(nnx.Module):
    """One halving or doubling of the resolution, a ReLU, and a residual block."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        direction: str,
        dtype: jnp.dtype,
        precision: jax.lax.PrecisionLike,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, precision=precision, rngs=rngs)
        self.resample: nnx.Conv | Doubling
        if direction == "down":
            init = _torch_init(16 * inputs)
            self.resample = nnx.Conv(
                inputs,
                width,
                (4, 4),
                strides=2,
                padding=((1, 1), (1, 1)),
                kernel_init=init,
                bias_init=init,
                dtype=dtype,
                precision=precision,  # type: ignore[arg-type]  # nnx: without DotAlgorithm
                rngs=rngs,
            )
        else:
            self.resample = Doubling(inputs, width, dtype=dtype, precision=precision, rngs=rngs)
        self.conv_1 = conv(width, width, 3)
        self.conv_2 = conv(width, width, 3)
        self.conv_3 = conv(width, width, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` -> `[b, h/2, w/2, width]` or `[b, 2h, 2w, width]`."""
        x = nnx.relu(self.resample(x))
        residual = nnx.relu(self.conv_1(x))
        residual = nnx.relu(self.conv_2(residual))
        return x + self.conv_3(residual)


def _torch_init(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for convolutions: kernel and bias uniform in ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)

    def uniform(
        key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
    ) -> jax.Array:
        # Drawn flat: the same numbers, but XLA takes a quarter of the time to compile the draw.
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return uniform


def _conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    dtype: jnp.dtype,
    precision: jax.lax.PrecisionLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Stride 1, the resolution kept."""
    init = _torch_init(inputs * size**2)
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        padding="SAME",
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
        precision=precision,  # type: ignore[arg-type]  # nnx's annotation lacks DotAlgorithm
        rngs=rngs,
    )


class Pyramid(nnx.Module):
    """`levels` halvings or doublings, then a 1×1 convolution in float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int,
        levels: int,
        direction: str,
        dtype: jnp.dtype,
        precision: jax.lax.PrecisionLike,
        rngs: nnx.Rngs,
    ):
        self.levels = levels
        level_of = functools.partial(
            Level, direction=direction, dtype=dtype, precision=precision, rngs=rngs
        )
        for index in range(1, levels + 1):
            setattr(self, f"level_{index}", level_of(inputs if index == 1 else width, width))
        # float32 as the DALL-E encoder's: ids are decided here.
        self.output = _conv(width, outputs, 1, dtype=jnp.float32, precision=precision, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """All but the last convolution: `[b, h, w, in]` -> `[b, h', w', width]`."""
        for index in range(1, self.levels + 1):
            x = getattr(self, f"level_{index}")(x)
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` -> float32 `[b, h', w', out]`."""
        return scores(self.output, self.features(x))


class DiscreteVAE(nnx.Module):
    """Encoder, codebook and decoder, on normalised images (`normalize`)."""

    def __init__(
        self,
        *,
        width: int = 256,
        levels: Annotated[int, Within(ge=1, le=10)] = 3,
        vocabulary: int = 8192,
        codebook_width: Annotated[int, Within(ge=1, le=65_536)] = 512,
        dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        pyramid = functools.partial(
            Pyramid, width=width, levels=levels, dtype=dtype, precision=precision, rngs=rngs
        )
        self.encoder = pyramid(3, vocabulary, direction="down")
        codes = jax.random.normal(rngs.params(), (vocabulary, codebook_width), jnp.float32)
        self.codebook = nnx.Param(codes)  # N(0, 1), as PyTorch's Embedding
        self.decoder = pyramid(codebook_width, 3, direction="up")
        self.precision = precision

    def logits(self, images: jax.Array) -> jax.Array:
        """Normalised `[b, s, s, 3]` -> float32 `[b, h, w, vocabulary]`."""
        return self.encoder(images)

    def features(self, images: jax.Array) -> jax.Array:
        """Normalised `[b, s, s, 3]` -> the last hidden layer, `[b, h, w, width]`."""
        return self.encoder.features(images)

    def feature_logits(self, features: jax.Array) -> jax.Array:
        """`features` of any positions, `[..., width]` -> float32 `[..., vocabulary]`."""
        return scores(self.encoder.output, features)

    def decode(self, ids: jax.Array) -> jax.Array:
        """Integers `[b, h, w]` -> normalised float32 `[b, s, s, 3]`; NaN where no such id."""
        return self.decoder(jnp.take(self.codebook[...], ids, axis=0))

    def decode_soft(self, weights: jax.Array) -> jax.Array:
        """Decodes mixtures of codes.

        Args:
          weights: float32 `[b, h, w, vocabulary]`, summing to 1 over the vocabulary.

        Returns:
          Normalised float32 `[b, s, s, 3]`.
        """
        codes = jnp.einsum("bhwv,vc->bhwc", weights, self.codebook[...], precision=self.precision)
        return self.decoder(codes)

    def gumbel_forward(
        self,
        images: jax.Array,
        *,
        key: jax.Array,
        temperature: float | jax.Array,
        straight_through: bool = False,
    ) -> GumbelOutput:
        """Samples soft tokens with Gumbel noise and reconstructs the images from them.

        Args:
          images: normalised `[b, s, s, 3]`.
          key: for the noise.
          temperature: of the softmax, over 0; official 0.9. Low is close to one-hot.
          straight_through: the forward pass uses the sample's one-hot argmax, the backward pass
            the softmax's gradient.

        Returns:
          The reconstruction and the logits.
        """
        logits = self.logits(images)
        noise = jax.random.gumbel(key, logits.shape, jnp.float32)
        weights = jax.nn.softmax((logits + noise) / temperature)
        if straight_through:
            hard = jax.nn.one_hot(jnp.argmax(weights, axis=-1), weights.shape[-1])
            weights = hard + weights - jax.lax.stop_gradient(weights)
        return GumbelOutput(reconstruction=self.decode_soft(weights), logits=logits)


def discrete_vae(config: DvaeConfig, *, precision: jax.lax.PrecisionLike = None) -> Functional:
    """The discrete VAE that `config` describes, for training.

    Args:
      config: its `width`, `levels`, `vocabulary`, `codebook_width` and `dtype` are used.
      precision: of the convolutions. None on TPU means one bfloat16 pass, even for float32 inputs.

    Returns:
      The functions; the methods are `logits`, `features`, `feature_logits`, `decode`,
      `decode_soft` and `gumbel_forward`.
    """
    return functional(
        lambda rngs: DiscreteVAE(
            width=config.width,
            levels=config.levels,
            vocabulary=config.vocabulary,
            codebook_width=config.codebook_width,
            dtype=compute_dtype(config),
            precision=precision,
            rngs=rngs,
        )
    )


def dvae_tokenizer(config: DvaeConfig, *, precision: jax.lax.PrecisionLike = None) -> Tokenizer:
    """The discrete VAE as a tokenizer.

    Args:
      config: the settings.
      precision: of the convolutions, as for `discrete_vae`.

    Returns:
      The functions; their params are `discrete_vae`'s.
    """
    vae = discrete_vae(config, precision=precision)

    def pixel_features(params: Params, pixels: jax.Array) -> jax.Array:
        return vae.apply(params, normalize(pixels), method="features")

    def feature_logits(params: Params, features: jax.Array) -> jax.Array:
        return vae.apply(params, features, method="feature_logits")

    def pixel_decode(params: Params, ids: jax.Array) -> jax.Array:
        return denormalize(vae.apply(params, ids, method="decode"))

    return Tokenizer(
        vocabulary=config.vocabulary,
        image_size=config.image_size,
        grid=config.grid,
        init=vae.init,
        encoding_params=lambda params: params,
        pixel_features=pixel_features,
        feature_logits=feature_logits,
        pixel_decode=pixel_decode,
        decoding_parts=("codebook", "decoder"),
    )
