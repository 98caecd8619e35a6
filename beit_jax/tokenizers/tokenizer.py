"""What every tokenizer is to the rest: images to a grid of token ids, and ids back to images.

tokenizer = open_tokenizer(config)  # beit_jax.tokenizers.loading
ids = tokenizer.encode(params, images)  # [b, h, w] int32, from uint8 [b, s, s, 3]
pictures = tokenizer.decode(params, ids)  # [b, s, s, 3] float32 in [0, 1]
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from beit_jax.models.functional import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer's pure functions. The parameters are the caller's.

    Attributes:
      vocabulary: how many token ids there are.
      image_size: height and width of the images, in pixels.
      grid: tokens along one side.
      init: key -> params, a plain nested dict of float32 arrays.
      encoding_params: params -> what `encode` and `logits` need of them, to keep on devices.
      pixel_logits: (params, images float32 `[b, s, s, 3]` in [0, 1]) -> float32 `[b, h, w, v]`.
        Maps the pixels to the network's own range.
      pixel_decode: (params, ids int32 `[b, h, w]`) -> float32 `[b, s, s, 3]` in [0, 1].
    """

    vocabulary: int
    image_size: int
    grid: int
    init: Callable[[jax.Array], Params]
    encoding_params: Callable[[Params], Params]
    pixel_logits: Callable[[Params, jax.Array], jax.Array]
    pixel_decode: Callable[[Params, jax.Array], jax.Array]

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
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != jnp.uint8:
            raise ValueError(
                f"the tokenizer takes uint8 [batch, {size}, {size}, 3], got "
                f"{images.dtype} {list(images.shape)}"
            )
        return self.pixel_logits(params, images.astype(jnp.float32) / 255)

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """Names each position's best token: the argmax, no sampling.

        Args:
          params: as `init` gives them; the decoder's may be missing.
          images: uint8 `[b, s, s, 3]`, RGB.

        Returns:
          int32 `[b, h, w]` in [0, vocabulary). Row-major flattening gives the patches' order.

        Raises:
          ValueError: images of another shape or type.
        """
        return jnp.argmax(self.logits(params, images), axis=-1).astype(jnp.int32)

    def decode(self, params: Params, ids: jax.Array) -> jax.Array:
        """Paints what token ids stand for.

        Args:
          params: as `init` gives them; the encoder's may be missing.
          ids: integers `[b, h, w]` in [0, vocabulary).

        Returns:
          float32 `[b, s, s, 3]` in [0, 1].

        Raises:
          ValueError: ids of another rank or type, or params without a decoder.
        """
        if ids.ndim != 3 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"decode takes integers [batch, height, width], got {ids.dtype} {list(ids.shape)}"
            )
        if "decoder" not in params:
            raise ValueError(
                "this tokenizer has no decoder weights: it can encode, but not decode; "
                "convert decoder.pkl together with encoder.pkl to get pictures"
            )
        return self.pixel_decode(params, ids)
