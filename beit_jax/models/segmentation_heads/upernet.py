"""UPerHead: pooling over pyramids of bins, then fusion from coarse to fine (arXiv 1807.10221).

As in mmseg 0.11's `uper_head.py`, with which BEiT's released segmentation models were trained.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from beit_jax.config import ModelConfig, SegmentHeadConfig, check
from beit_jax.models.blocks import compute_dtype
from beit_jax.models.convolution import (
    ConvModule,
    PixelClassifier,
    adaptive_average_pool,
    resize_bilinear,
)
from beit_jax.models.segmentation_heads.pyramid import largest_scale, pyramid_sides

LEVELS = 4


class UperHead(nnx.Module):
    """Scores pixels from maps of four sizes.

    Parameters, with C = `head.channels` and D the encoder's width: pyramid_{i} (1 × 1, D → C, one
    for each of `pool_scales`), bottleneck (3 × 3, D + 4C → C), lateral_{0,1,2} (1 × 1, D → C),
    output_{0,1,2} (3 × 3), fusion (3 × 3, 4C → C), each {"conv", "norm"}; classifier.
    """

    def __init__(
        self, config: ModelConfig, *, head: SegmentHeadConfig, classes: int, rngs: nnx.Rngs
    ):
        dtype, d = compute_dtype(config), config.width
        c = head.channels or d
        self.pool_scales = head.pool_scales

        def conv(inputs: int, size: int) -> ConvModule:
            return ConvModule(inputs, c, size, dtype=dtype, rngs=rngs)

        for index in range(len(head.pool_scales)):
            setattr(self, f"pyramid_{index}", conv(d, 1))
        self.bottleneck = conv(d + len(head.pool_scales) * c, 3)
        for index in range(LEVELS - 1):
            setattr(self, f"lateral_{index}", conv(d, 1))
            setattr(self, f"output_{index}", conv(c, 3))
        self.fusion = conv(LEVELS * c, 3)
        self.classifier = PixelClassifier(c, classes, dropout=head.dropout, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: list[jax.Array], *, train: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Scores the pixels of the largest map.

        Args:
          features: four maps `[b, h, w, d]`, the largest first.
          train: whether BatchNorm uses this batch's statistics.
          dropout_key: randomness of the dropout; None drops nothing.

        Returns:
          Logits, float32 `[b, h, w, classes]`.
        """
        maps = [
            getattr(self, f"lateral_{index}")(features[index], train=train)
            for index in range(LEVELS - 1)
        ]
        maps.append(self._pool(features[-1], train=train))
        for index in range(LEVELS - 1, 0, -1):
            finer = maps[index - 1]
            maps[index - 1] = finer + resize_bilinear(maps[index], size=_size(finer))
        # The coarsest has its convolution behind it, the bottleneck.
        for index in range(LEVELS - 1):
            maps[index] = getattr(self, f"output_{index}")(maps[index], train=train)
        maps = [resize_bilinear(each, size=_size(maps[0])) for each in maps]
        fused = self.fusion(jnp.concatenate(maps, axis=-1), train=train)
        return self.classifier(fused, dropout_key=dropout_key)

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The coarsest map with its means over bins of several sizes, `[b, h, w, c]`."""
        parts = [x.astype(self.bottleneck.conv.dtype)]
        for index, bins in enumerate(self.pool_scales):
            pooled = adaptive_average_pool(x, bins=bins)
            pooled = getattr(self, f"pyramid_{index}")(pooled, train=train)
            parts.append(resize_bilinear(pooled, size=_size(x)))
        return self.bottleneck(jnp.concatenate(parts, axis=-1), train=train)


def check_upernet(config: ModelConfig, head: SegmentHeadConfig) -> None:
    """Raises ConfigError unless there are four blocks, and pixels for the coarsest map."""
    check(
        len(head.blocks) == LEVELS,
        "head.blocks",
        f'"upernet" reads {LEVELS}, but these are {head.blocks}',
    )
    pooled = 8 // largest_scale(config)
    check(
        config.grid >= pooled,
        "model.image_size",
        f'{config.grid} × {config.grid} patches are too few for "upernet", which pools'
        f" {pooled} × {pooled} into one",
    )


def upernet_side(config: ModelConfig) -> int:
    """The side of the logits."""
    return pyramid_sides(config)[0]


def upernet_sides(config: ModelConfig, head: SegmentHeadConfig) -> dict[str, int]:
    """The side of the map that each module of the head makes."""
    sides = pyramid_sides(config)
    result = {f"pyramid_{index}": bins for index, bins in enumerate(head.pool_scales)}
    for index in range(LEVELS - 1):
        result[f"lateral_{index}"] = result[f"output_{index}"] = sides[index]
    return result | {"bottleneck": sides[-1], "fusion": sides[0], "classifier": sides[0]}


def _size(x: jax.Array) -> tuple[int, int]:
    return x.shape[1], x.shape[2]
