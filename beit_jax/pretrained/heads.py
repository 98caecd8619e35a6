"""Encoders with a head: the classifier, and the one that predicts visual tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from beit_jax.models import heads
from beit_jax.models.functional import Functional
from beit_jax.preprocessing import normalize
from beit_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from beit_jax.pretrained.model import Array, Pretrained, check_images, check_mask
from beit_jax.types import Params


class PretrainedClassifier(Pretrained):
    """A fine-tuned encoder with its classifier. `load_classifier` makes one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; empty where the checkpoint has none."""
        return self.description.labels

    @property
    def encoder(self) -> PretrainedEncoder:
        """The encoder alone, with the same parameters."""
        return encoder_of(self.params["encoder"], self.description)

    def __call__(self, images: Array) -> jax.Array:
        """uint8 images `[b, s, s, 3]` → logits, float32 `[b, c]`; compiled once per batch size.

        Raises:
          ValueError: images of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        return _classify(
            self.params,
            images,
            functions=self.functions,
            normalization=self.normalization,
            method=None,
        )

    def features(self, images: Array) -> jax.Array:
        """What the linear head sees: uint8 images `[b, s, s, 3]` → float32 `[b, d]`.

        The mean patch token, normalised by `fc_norm`; or the normalised class token.

        Raises:
          ValueError: images of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        return _classify(
            self.params,
            images,
            functions=self.functions,
            normalization=self.normalization,
            method="features",
        )

    def apply(
        self, params: Params, images: jax.Array, *, drop_path_key: jax.Array | None = None
    ) -> jax.Array:
        """The pure function: normalised float images `[b, s, s, 3]` → logits, float32 `[b, c]`.

        Args:
          params: as `params` or `init` gives them.
          images: normalised.
          drop_path_key: randomness for drop path; None runs every branch.
        """
        return self.functions.apply(params, images, drop_path_key=drop_path_key)

    def module(self) -> heads.Classifier:
        """A bare NNX module with the parameters inside; it takes normalised images."""
        return nnx.merge(self.functions.graphdef, self.params)


class PretrainedMaskedImageModel(Pretrained):
    """A pre-trained encoder with the head that predicts visual tokens.

    `load_masked_image_model` makes one.
    """

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.description.outputs

    @property
    def encoder(self) -> PretrainedEncoder:
        """The encoder alone, with the same parameters."""
        return encoder_of(self.params["encoder"], self.description)

    def __call__(self, images: Array, mask: Array) -> jax.Array:
        """Predicts the visual tokens of every patch; compiled once per batch size.

        Args:
          images: uint8 `[b, s, s, 3]`, RGB.
          mask: bool `[b, grid, grid]` or `[b, grid²]`; true patches are hidden from the encoder.

        Returns:
          Logits, float32 `[b, grid², v]`, in row-major order of the patches.

        Raises:
          ValueError: images or a mask of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        check_mask(mask, batch=np.shape(images)[0], grid=self.grid)
        return _predict(
            self.params,
            images,
            mask,
            functions=self.functions,
            normalization=self.normalization,
        )

    def apply(
        self,
        params: Params,
        images: jax.Array,
        *,
        mask: jax.Array,
        positions: jax.Array | None = None,
        drop_path_key: jax.Array | None = None,
    ) -> jax.Array:
        """The pure function.

        Args:
          params: as `params` or `init` gives them.
          images: normalised, float `[b, s, s, 3]`.
          mask: bool `[b, grid, grid]` or `[b, grid²]`; true patches are hidden.
          positions: int `[b, m]`, the patches to predict, row-major; None predicts all.
          drop_path_key: randomness for drop path; None runs every branch.

        Returns:
          Logits, float32 `[b, m, v]` (m = grid² where `positions` is None).

        Raises:
          ValueError: a mask of another shape or type, or parameters that don't fit.
        """
        check_mask(mask, batch=images.shape[0], grid=self.grid)
        return self.functions.apply(
            params, images, mask=mask, positions=positions, drop_path_key=drop_path_key
        )

    def module(self) -> heads.MaskedImageModel:
        """A bare NNX module with the parameters inside; it takes normalised images and a mask."""
        return nnx.merge(self.functions.graphdef, self.params)


@functools.partial(jax.jit, static_argnames=("functions", "normalization", "method"))
def _classify(
    params: Params,
    images: jax.Array,
    *,
    functions: Functional,
    normalization: str,
    method: str | None,
) -> jax.Array:
    images = normalize(images, kind=normalization)
    return functions.apply(params, images, method=method).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("functions", "normalization"))
def _predict(
    params: Params,
    images: jax.Array,
    mask: jax.Array,
    *,
    functions: Functional,
    normalization: str,
) -> jax.Array:
    return functions.apply(params, normalize(images, kind=normalization), mask=mask)
