"""BatchNorm and a linear layer on the patches: the probe of DINOv2 (arXiv 2304.07193, §7.4).

Outputs of several blocks are put side by side (its "+ms" reads four). DINOv2 normalises them with
the encoder's final norm first; these are raw, which BatchNorm makes up for channel by channel.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.convolution import BatchNorm, PixelClassifier


class LinearHead(nnx.Module):
    """Scores every patch by itself. Parameters: norm/{scale, bias}, classifier/{kernel, bias}."""

    def __init__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ):
        dtype, width = compute_dtype(config), config.width * len(head.blocks)
        self.norm = BatchNorm(width, dtype=dtype)
        self.classifier = PixelClassifier(
            width, classes, dropout=head.dropout, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Scores the patches.

        Args:
          features: maps `[b, g, g, d]`.
          train: whether BatchNorm uses this batch's statistics.
          dropout_key: randomness of the dropout; None drops nothing.

        Returns:
          Logits, float32 `[b, g, g, classes]`.
        """
        x = self.norm(jnp.concatenate(features, axis=-1), train=train)
        return self.classifier(x, dropout_key=dropout_key)


def check_linear(config: ModelConfig, head: SegmentHeadConfig) -> None:
    """Raises ConfigError where the head is given channels: it has none of its own."""
    del config
    check(head.channels == 0, "head.channels", f'"linear" has none to set, got {head.channels}')


def linear_side(config: ModelConfig) -> int:
    """The side of the logits."""
    return config.grid


def linear_sides(config: ModelConfig, head: SegmentHeadConfig) -> dict[str, int]:
    """The side of the map that each module of the head makes."""
    del head
    return {"classifier": config.grid}
