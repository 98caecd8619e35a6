"""Maps of four sizes from four blocks' outputs on one grid (official beit.py, `fpn1` to `fpn4`)."""

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import ModelConfig
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.convolution import BatchNorm, Doubling, max_pool
from beit_jax.models.kernels.gelu import gelu


class QuadruplingPath(nnx.Module):
    """Transposed convolution, BatchNorm, GELU, transposed convolution: four times the side."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv1 = Doubling(width, width, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(width, dtype=dtype)
        self.conv2 = Doubling(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[b, h, w, d]` → `[b, 4h, 4w, d]`."""
        return self.conv2(gelu(self.norm(self.conv1(x), train=train)))


class DoublingPath(nnx.Module):
    """One transposed convolution: twice the side."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Doubling(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, d]` → `[b, 2h, 2w, d]`."""
        return self.conv(x)


class FeaturePyramid(nnx.Module):
    """Four maps on one grid → maps of four sizes, each half the one before.

    With patches of 8 pixels their sides are 2, 1, 1/2 and 1/4 grids, else 4, 2, 1 and 1/2: of
    patches of 16 pixels, as of those of 8, 1/4 of the image and so on. Other patches are not in
    the official code; here they have the second form (as in `transformers`, which has it for 8
    pixels, too).

    Parameters: up4/{conv1, norm, conv2} (not with patches of 8 pixels) and up2/conv.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.largest = largest_scale(config)
        if self.largest == 4:
            self.up4 = QuadruplingPath(config.width, dtype=dtype, rngs=rngs)
        self.up2 = DoublingPath(config.width, dtype=dtype, rngs=rngs)

    def __call__(self, features: list[jax.Array], *, train: bool) -> list[jax.Array]:
        """Four maps `[b, g, g, d]` → four maps, the largest first.

        Args:
          features: outputs of four blocks.
          train: whether BatchNorm uses this batch's statistics.
        """
        first, second, third, fourth = features
        if self.largest == 4:
            larger = [self.up4(first, train=train), self.up2(second), third]
        else:
            larger = [self.up2(first), second, max_pool(third, size=2)]
        return [*larger, max_pool(fourth, size=8 // self.largest)]


def largest_scale(config: ModelConfig) -> int:
    """The side of the largest map over that of the grid."""
    return 2 if config.patch_size == 8 else 4


def pyramid_sides(config: ModelConfig) -> tuple[int, int, int, int]:
    """The sides of the four maps, the largest first."""
    largest, grid = largest_scale(config), config.grid
    return largest * grid, largest * grid // 2, largest * grid // 4, grid // (8 // largest)
