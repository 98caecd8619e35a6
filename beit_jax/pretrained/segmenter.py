"""The segmenter: a class for every pixel of an image of any size."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from beit_jax.config import check
from beit_jax.config.segment import InferenceConfig
from beit_jax.models.functional import Functional
from beit_jax.models.segmenter import Segmenter
from beit_jax.preprocessing import normalize
from beit_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from beit_jax.pretrained.model import Array, Pretrained, check_images
from beit_jax.segmentation import sliding, windows
from beit_jax.types import Batch, Params, Variables


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedSegmenter(Pretrained):
    """An encoder with a head that scores every pixel. `load_segmenter` makes one.

    Attributes:
      variables: BatchNorm's running statistics, nested dict of float32 arrays.
      inference: how `segment` covers an image, unless it is told otherwise: as the checkpoint's run
        evaluated; else one scale, in windows that advance by two thirds of their side (official:
        341 of 512, 426 of 640).
      short_side: pixels that the shorter side of an image becomes at scale 1.
      long_side: and the most that the longer one may become.
    """

    variables: Variables = dataclasses.field(repr=False)
    inference: InferenceConfig
    short_side: int
    long_side: int
    _rooms: dict[int, windows.Rooms] = dataclasses.field(
        init=False, repr=False, default_factory=dict
    )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; empty where the checkpoint has none."""
        return self.description.labels

    @property
    def encoder(self) -> PretrainedEncoder:
        """The encoder alone, with the same parameters."""
        return encoder_of(self.params["encoder"], self.description)

    def logits(self, images: Array) -> jax.Array:
        """Scores of images that fit the model; compiled once per batch size.

        Args:
          images: uint8 `[b, s, s, 3]`, RGB.

        Returns:
          float32 `[b, q, q, c]`; q is s/4 of UperNet with patches of 16 pixels, the grid of a
          linear head.

        Raises:
          ValueError: images of another size, shape or type.
        """
        check_images(images, image_size=self.image_size)
        return _logits(
            self.params,
            self.variables,
            images,
            functions=self.functions,
            normalization=self.normalization,
        )

    def segment(
        self,
        image: np.ndarray,
        *,
        stride: int | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> np.ndarray:
        """The class of every pixel of one image.

        The image keeps its shape and is resized to `short_side`; windows of the model's size slide
        over it, and their logits are averaged where they overlap. Compiled anew when an image has
        more windows than any before, in powers of two.

        Args:
          image: uint8 `[h, w, 3]`, RGB, of any size.
          stride: pixels that windows advance by.
          scales: of the image's sides; class probabilities are averaged over them.
          flip: whether they are averaged over the mirrored image, too.

        Returns:
          uint8 `[h, w]`, the index of the most probable class.

        Raises:
          ConfigError: no RGB image, or windows that leave gaps.
        """
        inference = self.settings(stride=stride, scales=scales, flip=flip)
        (classes,) = self.segment_batch([image], inference=inference, batch=1)
        return classes

    def settings(
        self,
        *,
        stride: int | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> InferenceConfig:
        """`inference` with what is given in place of its own.

        Raises:
          ConfigError: windows would leave gaps, or a value is out of range.
        """
        own = self.inference
        inference = dataclasses.replace(
            own,
            stride=own.stride if stride is None else stride,
            scales=own.scales if scales is None else tuple(float(scale) for scale in scales),
            flip=own.flip if flip is None else flip,
        )
        windows.check_windows(inference, crop=self.image_size)
        return inference

    def segment_batch(
        self,
        images: Sequence[np.ndarray],
        *,
        inference: InferenceConfig | None = None,
        batch: int | None = None,
    ) -> list[np.ndarray]:
        """`segment` of several images at once.

        Args:
          images: each uint8 `[h, w, 3]`, RGB, of any size.
          inference: how they are covered (`settings`); None: as `self.inference` says.
          batch: how many images are compiled for, at least as many as there are; None: so many.

        Returns:
          For each a class map uint8 `[h, w]`.

        Raises:
          ConfigError: no RGB image, more images than `batch`, or windows that leave gaps.
        """
        inference = self.settings() if inference is None else inference
        batch = len(images) if batch is None else batch
        check(len(images) <= batch, "images", f"{len(images)} are more than batch, {batch}")
        if not len(images):
            return []
        rooms = self._rooms.setdefault(inference.tile, windows.Rooms(tile=inference.tile))
        prepared = [self.prepare(image, inference=inference) for image in images]
        packed = windows.pack(prepared, images=batch, crop=self.image_size, rooms=rooms)
        tiles = np.asarray(
            _segment(
                self.params,
                self.variables,
                packed,
                functions=self.functions,
                normalization=self.normalization,
                passes=windows.passes(inference),
                tile=inference.tile,
            )
        )
        return [windows.assemble(tiles[i], size=each.size) for i, each in enumerate(prepared)]

    def prepare(self, image: np.ndarray, *, inference: InferenceConfig) -> windows.Prepared:
        """An image of any size, uint8 `[h, w, 3]`, as the windows that cover it."""
        return windows.prepare_image(
            image,
            config=inference,
            crop=self.image_size,
            shorter=self.short_side,
            longer=self.long_side,
        )

    def apply(self, params: Params, variables: Variables, images: jax.Array) -> jax.Array:
        """The pure function: normalised float images `[b, s, s, 3]` → logits `[b, q, q, c]`.

        With running statistics, as in evaluation; `functions.apply_and_update` trains.
        """
        return self.functions.apply(params, images, variables=variables)

    def predict(
        self, params: Params, variables: Variables, batch: Batch, *, passes: int, tile: int
    ) -> jax.Array:
        """The pure function behind `segment`, of a batch of `segmentation.windows.pack`.

        Returns:
          uint8 `[b, T, tile, tile]`, for `segmentation.windows.assemble`.
        """
        return sliding.predict(
            lambda pixels: self.apply(params, variables, pixels),
            batch,
            normalization=self.normalization,
            passes=passes,
            tile=tile,
        )

    def module(self) -> Segmenter:
        """A bare NNX module with the numbers inside; it takes normalised images."""
        return nnx.merge(self.functions.graphdef, self.params, self.variables)


@functools.partial(jax.jit, static_argnames=("functions", "normalization"))
def _logits(
    params: Params,
    variables: Variables,
    images: jax.Array,
    *,
    functions: Functional,
    normalization: str,
) -> jax.Array:
    pixels = normalize(jnp.asarray(images), kind=normalization)
    return functions.apply(params, pixels, variables=variables)


@functools.partial(jax.jit, static_argnames=("functions", "normalization", "passes", "tile"))
def _segment(
    params: Params,
    variables: Variables,
    batch: Batch,
    *,
    functions: Functional,
    normalization: str,
    passes: int,
    tile: int,
) -> jax.Array:
    return sliding.predict(
        lambda pixels: functions.apply(params, pixels, variables=variables),
        batch,
        normalization=normalization,
        passes=passes,
        tile=tile,
    )
