"""Convolutions, BatchNorm, pooling and resizing of feature maps, as segmentation heads use them.

Maps are `[b, h, w, c]`; kernels are `[h, w, in, out]` and not flipped. What changes a map's size
is a matrix product or a reshape where that is possible: XLA's convolutions of dilated inputs
multiply by the inserted zeros, and gathers are slow on TPUs.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from beit_jax.models.kernels.matmul import matmul

EPSILON = 1e-5  # PyTorch's defaults for BatchNorm2d, which mmseg keeps
MOMENTUM = 0.1  # of the new batch in the running statistics


def kaiming_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Normal of variance 2 / (k² · outputs): mmcv's for convolutions before a ReLU (fan_out)."""
    fan_out = math.prod(shape) // shape[-2]
    return _flat_normal(key, shape, dtype) * (2 / fan_out) ** 0.5


def classifier_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Normal of standard deviation 0.01: mmseg's for the layer that scores the classes."""
    return _flat_normal(key, shape, dtype) * 0.01


def _flat_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    # Drawn flat: the same numbers, but XLA takes a quarter of the time to compile the draw.
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


class Conv(nnx.Module):
    """A convolution without bias, of stride 1, that keeps the map's size.

    Args:
      inputs, outputs: channels.
      size: of the kernel, odd.
      dtype: of the products.
      rngs: its stream `params` draws the kernel.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kaiming_normal(rngs.params(), (size, size, inputs, outputs)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` → `[b, h, w, out]`."""
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        if kernel.shape[:2] == (1, 1):
            return matmul(x, kernel[0, 0])
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Doubling(nnx.Module):
    """PyTorch's `ConvTranspose2d(inputs, outputs, 2, stride=2)`.

    Kernel and stride are equal, so that every input pixel makes a 2 × 2 square of its own: one
    matrix product and a reshape.

    The kernel is `[2, 2, in, out]`: a PyTorch weight `[in, out, h, w]` transposed by (2, 3, 0, 1).
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # PyTorch takes the second axis of the weight, the outputs, for the fan-in.
        bound = 1 / math.sqrt(4 * outputs)
        count = 4 * inputs * outputs
        kernel = jax.random.uniform(rngs.params(), (count,), minval=-bound, maxval=bound)
        self.kernel = nnx.Param(kernel.reshape(2, 2, inputs, outputs))
        self.bias = nnx.Param(
            jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound)
        )
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, in]` → `[b, 2h, 2w, out]`."""
        kernel = rearrange(self.kernel[...], "a c i o -> i (a c o)").astype(self.dtype)
        y = matmul(x.astype(self.dtype), kernel)
        y = rearrange(y, "b h w (a c o) -> b (h a) (w c) o", a=2, c=2)
        return y + self.bias.astype(self.dtype)


class BatchNorm(nnx.Module):
    """PyTorch's `SyncBatchNorm` with its defaults: statistics over the global batch, in float32.

    A batch is normalised by its biased variance; the running average takes the unbiased one.

    Parameters: `scale` and `bias`, `[c]`. Variables, all float32: the running `mean` and `var`,
    `[c]`, and `count`, a scalar: how many batches they have seen (PyTorch's
    `num_batches_tracked`), exact up to 2^24.
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.mean = nnx.BatchStat(jnp.zeros((channels,)))
        self.var = nnx.BatchStat(jnp.ones((channels,)))
        self.count = nnx.BatchStat(jnp.zeros(()))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises every channel.

        Args:
          x: `[b, h, w, c]`, the global batch.
          train: whether by this batch's statistics, which also go into the running ones; False:
            by the running ones.

        Returns:
          `[b, h, w, c]` in the layer's dtype.

        Raises:
          ValueError: training with one value per channel, which has no variance.
        """
        x = x.astype(jnp.float32)
        if train:
            mean, variance = self._statistics(x)
        else:
            mean, variance = self.mean[...], self.var[...]
        factor = self.scale[...] * jax.lax.rsqrt(variance + EPSILON)
        return ((x - mean) * factor + self.bias[...]).astype(self.dtype)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of the batch; moves the running statistics towards them."""
        values = math.prod(x.shape[:-1])
        if values < 2:
            raise ValueError("BatchNorm in training needs a batch of at least two images")
        mean = x.mean((0, 1, 2))
        if self.dtype == jnp.bfloat16:
            # One pass over x instead of two. Where the mean is r standard deviations it is off by
            # r² · 6e-8, less than bfloat16's rounding up to r = 200.
            variance = jnp.maximum(jnp.square(x).mean((0, 1, 2)) - jnp.square(mean), 0)
        else:
            variance = jnp.square(x - mean).mean((0, 1, 2))
        unbiased = variance * (values / (values - 1))
        self.mean[...] += MOMENTUM * (jax.lax.stop_gradient(mean) - self.mean[...])
        self.var[...] += MOMENTUM * (jax.lax.stop_gradient(unbiased) - self.var[...])
        self.count[...] += 1
        return mean, variance


class ConvModule(nnx.Module):
    """mmcv's convolution without bias, BatchNorm and ReLU: {"conv": {"kernel"}, "norm": ...}."""

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[b, h, w, in]` → `[b, h, w, out]`; `train` as for `BatchNorm`."""
        return nnx.relu(self.norm(self.conv(x), train=train))


class PixelClassifier(nnx.Module):
    """Dropout of whole channels and a linear layer for every pixel (mmseg's `cls_seg`).

    Parameters: `kernel` `[1, 1, c, classes]` and `bias` `[classes]`.
    """

    def __init__(
        self, channels: int, classes: int, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        self.kernel = nnx.Param(classifier_normal(rngs.params(), (1, 1, channels, classes)))
        self.bias = nnx.Param(jnp.zeros((classes,)))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, dropout_key: jax.Array | None) -> jax.Array:
        """`[b, h, w, c]` → logits, float32 `[b, h, w, classes]`.

        Args:
          x: the map.
          dropout_key: randomness of the dropout; None drops nothing.
        """
        if dropout_key is not None and self.dropout > 0:
            x = drop_channels(x, key=dropout_key, rate=self.dropout)
        # Accumulated and kept in float32: the cross-entropy should not see rounded logits.
        kernel = self.kernel[0, 0].astype(self.dtype)
        logits = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits + self.bias[...]


def drop_channels(x: jax.Array, *, key: jax.Array, rate: float) -> jax.Array:
    """Sets whole channels of an image to zero and scales up the rest (PyTorch's `Dropout2d`).

    Args:
      x: `[b, h, w, c]`.
      key: draws which.
      rate: the probability of each image's each channel.
    """
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def max_pool(x: jax.Array, *, size: int) -> jax.Array:
    """The largest of every `size` × `size` square; an incomplete one at the border is left out.

    `[b, h, w, c]` → `[b, h // size, w // size, c]`.
    """
    window = (1, size, size, 1)
    return cast(jax.Array, jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID"))


def adaptive_average_pool(x: jax.Array, *, bins: int) -> jax.Array:
    """PyTorch's `AdaptiveAvgPool2d`: `[b, h, w, c]` → float32 `[b, bins, bins, c]`.

    Bins are as equal as whole pixels allow, and overlap where `bins` does not divide the side.
    """
    rows, columns = _averaging(x.shape[1], bins), _averaging(x.shape[2], bins)
    return _products(x.astype(jnp.float32), rows, columns)


def resize_bilinear(x: jax.Array, *, size: tuple[int, int]) -> jax.Array:
    """PyTorch's `interpolate(mode="bilinear", align_corners=False)`, without antialiasing.

    Pixel centres are at half-integers, and beyond the border is the border's value.

    Args:
      x: `[b, h, w, c]`.
      size: height and width of the result; larger or smaller.

    Returns:
      `[b, *size, c]` in the dtype of `x`.
    """
    if x.shape[1:3] == size:
        return x
    rows, columns = (
        interpolation_weights(x.shape[1], size[0]),
        interpolation_weights(x.shape[2], size[1]),
    )
    # Factors 2, 4 and 8 have weights that bfloat16 holds exactly; others are taken in float32.
    exact = all(
        np.array_equal(np.asarray(weights, x.dtype).astype(np.float32), weights)
        for weights in (rows, columns)
    )
    dtype = x.dtype if exact else jnp.float32
    return _products(x.astype(dtype), rows, columns).astype(x.dtype)


def _products(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Multiplies both sides of a map by matrices, `[new, old]`."""
    for matrix, equation in ((rows, "oh,bhwc->bowc"), (columns, "ow,bhwc->bhoc")):
        # TPUs would round float32 factors to bfloat16.
        x = jnp.einsum(equation, matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    return x


def _averaging(size: int, bins: int) -> np.ndarray:
    """The mean over each bin: float32 `[bins, size]`. Bin i is from ⌊i·n/k⌋ to ⌈(i+1)·n/k⌉."""
    matrix = np.zeros((bins, size), np.float32)
    for index in range(bins):
        start, stop = index * size // bins, -(-(index + 1) * size // bins)
        matrix[index, start:stop] = 1 / (stop - start)
    return matrix


def interpolation_weights(size: int, new: int) -> np.ndarray:
    """Weights of the two pixels next to each new centre, half-pixel: float32 `[new, size]`."""
    centres = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, size - 1)
    share = (centres - low).astype(np.float32)
    matrix = np.zeros((new, size), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - share)
    np.add.at(matrix, (np.arange(new), high), share)
    return matrix
