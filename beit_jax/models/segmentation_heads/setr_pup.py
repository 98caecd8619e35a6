"""SETR's progressive upsampling (arXiv 2012.15840, §3.2; mmseg's `setr_up_head.py`).

The head of the paper's tables 3 and 4, whose code and weights were never released. From SETR and
mmseg's `configs/_base_/models/setr_pup.py`: a LayerNorm of ε = 1e-6 on the last block read, then
per stage a 3 × 3 convolution without bias, BatchNorm, ReLU and a bilinear doubling, as many as make
the image's side (four for patches of 16 pixels). The width is 256 there (`head.channels=256`) and
there is no dropout (`head.dropout=0`).

Assumed, because nothing says what BEiT's authors did: the same, and in place of mmseg's three
auxiliary heads of this kind the one of UperNet.
"""

import jax
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.convolution import ConvModule, PixelClassifier, resize_bilinear

NORM_EPSILON = 1e-6


class ProgressiveHead(nnx.Module):
    """Doubles the last map until it has the image's side.

    Parameters: norm/{scale, bias}, stage_{i}/{conv, norm}, classifier/{kernel, bias}.
    """

    def __init__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ):
        dtype = compute_dtype(config)
        c = head.channels or config.width
        self.stages = config.patch_size.bit_length() - 1
        self.norm = nnx.LayerNorm(
            config.width, epsilon=NORM_EPSILON, dtype=dtype, use_fast_variance=False, rngs=rngs
        )
        for index in range(self.stages):
            inputs = c if index else config.width
            setattr(self, f"stage_{index}", ConvModule(inputs, c, 3, dtype=dtype, rngs=rngs))
        self.classifier = PixelClassifier(c, classes, dropout=head.dropout, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Scores the image's pixels.

        Args:
          features: maps `[b, g, g, d]`, of which the last one counts.
          train: whether BatchNorm uses this batch's statistics.
          dropout_key: randomness of the dropout; None drops nothing.

        Returns:
          Logits, float32 `[b, s, s, classes]`, s the image's side.
        """
        x = self.norm(features[-1])
        for index in range(self.stages):
            x = x if index == 0 else _doubled(x)
            x = getattr(self, f"stage_{index}")(x, train=train)
        # The classifier comes before the last doubling and not after it: the result is the same,
        # because interpolation keeps sums of channels, at a quarter of the time and memory.
        return _doubled(self.classifier(x, dropout_key=dropout_key))


def check_setr_pup(config: ModelConfig, head: SegmentHeadConfig) -> None:
    """Raises ConfigError unless doubling makes the image's side."""
    del head
    p = config.patch_size
    check(
        p > 1 and p & (p - 1) == 0,
        "model.patch_size",
        f'"setr_pup" doubles a patch into its pixels, so it takes powers of two, not {p}',
    )


def setr_pup_side(config: ModelConfig) -> int:
    """The side of the logits."""
    return config.image_size


def setr_pup_sides(config: ModelConfig, head: SegmentHeadConfig) -> dict[str, int]:
    """The side of the map that each module of the head makes."""
    del head
    stages = config.patch_size.bit_length() - 1
    result = {f"stage_{index}": config.grid * 2**index for index in range(stages)}
    return result | {"classifier": config.image_size // 2}


def _doubled(x: jax.Array) -> jax.Array:
    return resize_bilinear(x, size=(2 * x.shape[1], 2 * x.shape[2]))
