"""How parameters are drawn at the start of pre-training and of fine-tuning."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Initializer(Protocol):
    """Draws a parameter, as `jax.nn.initializers` do."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """An array of this shape and dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How an encoder's parameters are drawn.

    Attributes:
      weights: linear layers, class and mask token, absolute positions.
      patches: the patch projection.
      patch_bias: whether the patch projection's bias is drawn like its weight; False: zeros.
    """

    weights: Initializer
    patches: Initializer
    patch_bias: bool


def pretraining_init(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Normal with standard deviation 0.02, cut at ±0.02, i.e. at ±1σ (modeling_pretrain.py:21)."""
    return 0.02 * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)


def _fine_tuning_weights(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Normal with standard deviation 0.02; the official cut, ±2, lies at ±100σ: none."""
    return 0.02 * jax.random.normal(key, shape, dtype)


def _uniform_patches(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """PyTorch's default for a convolution's weight and bias: uniform within ±1/√fan_in."""
    fan_in = 3 * shape[0] * shape[1]
    return jax.random.uniform(key, shape, dtype, -1, 1) / fan_in**0.5


PRETRAINING = Initialization(pretraining_init, pretraining_init, patch_bias=False)
# The official fine-tuning class cuts elsewhere and leaves the patch projection as PyTorch makes it
# (modeling_finetune.py:289-317).
FINE_TUNING = Initialization(_fine_tuning_weights, _uniform_patches, patch_bias=True)
