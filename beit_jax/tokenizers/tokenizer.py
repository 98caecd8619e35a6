"""The one interface of all tokenizers: images to a grid of token ids, and ids back to images.

    tokenizer = open_tokenizer(config)  # beit_jax.tokenizers.loading
    ids = tokenizer.encode(params, images)  # [b, h, w] int32, from uint8 [b, s, s, 3]
    some = tokenizer.encode(params, images, positions=positions)  # [b, k]; [b, k] grid positions
    if tokenizer.paints(params):
        pictures = tokenizer.decode(params, ids)  # [b, s, s, 3] float32 in [0, 1]

A tokenizer in use is frozen, so one dict holds all of its arrays. Where its training keeps some of
them apart, because no gradient trains them (a codebook that follows a moving average), `join` puts
those under "variables" and `split` takes the two apart again.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.types import Params, Variables


def scores(output: nnx.Conv, features: jax.Array) -> jax.Array:
    """A 1 × 1 convolution in float32 as the matrix product it is, for all positions or for some.

    Args:
      output: the convolution; its kernel, bias and precision are used.
      features: `[..., in]`, of any dtype.

    Returns:
      float32 `[..., out]`.
    """
    bias = output.bias
    if bias is None:
        raise ValueError("scores need a convolution with a bias")
    product = jnp.matmul(
        features.astype(jnp.float32), output.kernel[0, 0], precision=output.precision
    )
    return product + bias[...]


def join(params: Params, variables: Variables) -> Params:
    """One dict of all of a tokenizer's arrays; `params` itself where there are no variables."""
    return params | {"variables": variables} if variables else params


def split(params: Params) -> tuple[Params, Variables]:
    """The inverse of `join`: the parameters that a gradient trained, and the variables."""
    trained = {name: part for name, part in params.items() if name != "variables"}
    return trained, params.get("variables", {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer's pure functions. The parameters are the caller's.

    Attributes:
      vocabulary: how many token ids there are.
      image_size: height and width of the images, in pixels.
      grid: tokens along one side.
      init: key -> params, a plain nested dict of float32 arrays, variables included (`join`).
      encoding_params: params -> those that `encode` and `logits` need, to keep on devices.
      pixel_features: (params, images float32 `[b, s, s, 3]` in [0, 1]) -> `[b, h, w, c]`.
        Everything but the last 1 × 1 convolution; maps the pixels to the network's range.
      feature_logits: (params, some of these features `[..., c]`) -> float32 `[..., v]`.
      pixel_decode: (params, ids int32 `[b, h, w]`) -> float32 `[b, s, s, 3]` in [0, 1]; None for
        a kind that cannot paint.
      decoding_parts: the entries of params that `pixel_decode` needs.
      cannot_decode: what to do where one of them is missing; the end of a message.
    """

    vocabulary: int
    image_size: int
    grid: int
    init: Callable[[jax.Array], Params]
    encoding_params: Callable[[Params], Params]
    pixel_features: Callable[[Params, jax.Array], jax.Array]
    feature_logits: Callable[[Params, jax.Array], jax.Array]
    pixel_decode: Callable[[Params, jax.Array], jax.Array] | None = None
    decoding_parts: tuple[str, ...] = ()
    cannot_decode: str = ""

    def paints(self, params: Params) -> bool:
        """Whether `decode` works with these parameters, which may lack the decoder's."""
        return self.pixel_decode is not None and all(part in params for part in self.decoding_parts)

    def logits(self, params: Params, images: jax.Array) -> jax.Array:
        """Scores every token at every position.

        Args:
          params: as `init` gives them; the decoder's may be missing.
          images: uint8 `[b, s, s, 3]`, RGB.

        Returns:
          float32 `[b, h, w, v]`.

        Raises:
          ValueError: images of another shape or type.
        """
        return self.feature_logits(params, self._features(params, images))

    def _features(self, params: Params, images: jax.Array) -> jax.Array:
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != jnp.uint8:
            raise ValueError(
                f"the tokenizer takes uint8 [batch, {size}, {size}, 3], got "
                f"{images.dtype} {list(images.shape)}"
            )
        return self.pixel_features(params, images.astype(jnp.float32) / 255)

    def encode(
        self, params: Params, images: jax.Array, *, positions: jax.Array | None = None
    ) -> jax.Array:
        """Tokenises images: each position's best token, the argmax, without sampling.

        Args:
          params: as `init` gives them; the decoder's may be missing.
          images: uint8 `[b, s, s, 3]`, RGB.
          positions: integers `[b, k]`, row-major indices into the grid; None for all. Only these
            are scored: 75 of 196 save 8 % of the DALL-E encoder's FLOPs.

        Returns:
          int32 in [0, vocabulary): `[b, h, w]`, whose row-major flattening gives the patches'
          order, or `[b, k]`.

        Raises:
          ValueError: images of another shape or type.
        """
        features = self._features(params, images)
        if positions is not None:
            features = features.reshape(features.shape[0], -1, features.shape[-1])
            features = jnp.take_along_axis(features, positions[:, :, None], axis=1)
        logits = self.feature_logits(params, features)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def decode(self, params: Params, ids: jax.Array) -> jax.Array:
        """Turns token ids back into images.

        Args:
          params: as `init` gives them; the encoder's may be missing.
          ids: integers `[b, h, w]` in [0, vocabulary).

        Returns:
          float32 `[b, s, s, 3]` in [0, 1].

        Raises:
          ValueError: ids of another rank or type, a kind that cannot paint, or params without a
            decoder.
        """
        if ids.ndim != 3 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"decode takes integers [batch, height, width], got {ids.dtype} {list(ids.shape)}"
            )
        if self.pixel_decode is None:
            raise ValueError("this kind of tokenizer has no decoder: it can encode, but not decode")
        if not self.paints(params):
            hint = f"; {self.cannot_decode}" if self.cannot_decode else ""
            raise ValueError(
                f"this tokenizer has no decoder weights: it can encode, but not decode{hint}"
            )
        return self.pixel_decode(params, ids)
