"""The head that only training uses: a loss on an earlier block's outputs (mmseg 0.11's FCNHead)."""

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.convolution import ConvModule, PixelClassifier

LEVEL = 2  # of the feature maps: the official `in_index`, the third block that is read


class AuxiliaryHead(nnx.Module):
    """3 × 3 convolutions on the third feature map, dropout and a classifier.

    Parameters: conv_{i}/..., concat/... (with `auxiliary_concat`), classifier/{kernel, bias}.
    """

    def __init__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ):
        dtype, channels = compute_dtype(config), head.auxiliary_channels
        self.convs = head.auxiliary_convs
        for index in range(self.convs):
            inputs = channels if index else config.width
            setattr(self, f"conv_{index}", ConvModule(inputs, channels, 3, dtype=dtype, rngs=rngs))
        if head.auxiliary_concat:
            self.concat = ConvModule(config.width + channels, channels, 3, dtype=dtype, rngs=rngs)
        self.classifier = PixelClassifier(
            channels, classes, dropout=head.dropout, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Scores the pixels of the third feature map.

        Args:
          features: maps `[b, h, w, d]`, as the head is given them.
          train: whether BatchNorm uses this batch's statistics.
          dropout_key: randomness of the dropout; None drops nothing.

        Returns:
          Logits, float32 `[b, h, w, classes]`.
        """
        x = features[LEVEL]
        for index in range(self.convs):
            x = getattr(self, f"conv_{index}")(x, train=train)
        if hasattr(self, "concat"):
            x = self.concat(jnp.concatenate([features[LEVEL].astype(x.dtype), x], -1), train=train)
        return self.classifier(x, dropout_key=dropout_key)


def check_auxiliary(config: ModelConfig, head: SegmentHeadConfig) -> None:
    """Raises ConfigError where the settings make no auxiliary head.

    Raises:
      ConfigError: there is no third block to read, or no convolution that makes the channels.
    """
    if not head.auxiliary_channels:
        return
    check(
        len(head.blocks) > LEVEL,
        "head.auxiliary_channels",
        f"the auxiliary head reads the third of head.blocks, which are {head.blocks}; 0 is none",
    )
    check(
        head.auxiliary_convs > 0 or head.auxiliary_channels == config.width,
        "head.auxiliary_convs",
        f"without convolutions head.auxiliary_channels must be the width, {config.width}",
    )
