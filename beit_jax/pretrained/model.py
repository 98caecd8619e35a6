"""What every loaded model has, and the one check of the images it is called with."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config import ModelConfig
from beit_jax.models.functional import Functional
from beit_jax.preprocessing import normalize
from beit_jax.types import Params
from beit_jax.weights.description import Description

Array: TypeAlias = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """What every loaded model has.

    Attributes:
      params: nested dict of float32 arrays on the default device.
      description: what the checkpoint is: task, sizes, normalisation, labels.
      functions: the module as pure functions of `params`.
    """

    params: Params = dataclasses.field(repr=False)
    description: Description
    functions: Functional = dataclasses.field(repr=False)

    @property
    def config(self) -> ModelConfig:
        """The encoder's sizes and variant."""
        return self.description.model

    @property
    def normalization(self) -> str:
        """How pixels are normalised for this checkpoint: "half" or "imagenet"."""
        return self.description.normalization

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.image_size

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.config.grid

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.config.width

    def normalize(self, images: Array) -> jax.Array:
        """uint8 `[..., s, s, 3]` → float32 of the same shape, as the checkpoint expects pixels."""
        return normalize(jnp.asarray(images), kind=self.normalization)

    def init(self, key: jax.Array) -> Params:
        """Draws new parameters: the same names and shapes as `params`, from scratch."""
        return self.functions.init(key)


def check_images(images: Array, *, image_size: int) -> None:
    """Raises ValueError unless `images` are uint8 `[b, image_size, image_size, 3]`."""
    found = getattr(images, "dtype", None)
    if not isinstance(images, np.ndarray | jax.Array) or found != np.uint8:
        hint = ""
        if isinstance(found, np.dtype) and np.issubdtype(found, np.floating):
            hint = "; apply(params, images) takes normalised floats, as normalize() gives them"
        raise ValueError(f"images: must be a uint8 array, got {found or type(images)}{hint}")
    shape = np.shape(images)
    if len(shape) == 3:
        raise ValueError(f"images: {list(shape)}; must be a batch: images[None]")
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(
            f"images: {list(shape)}; must be [batch, {image_size}, {image_size}, 3], channels last"
        )
    if shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"images: {shape[1]} × {shape[2]}, but this model takes {image_size} × {image_size};"
            f" resize them, or load the model for square images with image_size="
        )


def check_mask(mask: Array, *, batch: int, grid: int) -> None:
    """Raises ValueError unless `mask` is bool, `[batch, grid, grid]` or `[batch, grid²]`.

    Numbers would pass as "true where not zero": token ids or probabilities as a mask of everything.
    """
    shape, found = np.shape(mask), getattr(mask, "dtype", None)
    if not isinstance(mask, np.ndarray | jax.Array) or found != np.bool_:
        raise ValueError(f"mask: must be a bool array, got {found or type(mask)}")
    if shape not in ((batch, grid, grid), (batch, grid * grid)):
        raise ValueError(f"mask: {list(shape)}; must be [{batch}, {grid}, {grid}]")
