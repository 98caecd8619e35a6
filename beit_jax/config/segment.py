"""Settings of semantic segmentation: the head, the images with their label maps, inference."""

import dataclasses
from typing import Annotated, TypeAlias

from beit_jax.config.bounds import (
    Block,
    Name,
    OneOf,
    Pixels,
    Rate,
    Share,
    Within,
    check_fields,
)
from beit_jax.config.data import SourceConfig
from beit_jax.config.parse import check, shape_setting

IGNORE = 255  # what an ignored pixel is, in every map behind the source
LARGEST_CLASSES = 255  # labels are 8 bits, and 255 is none

Bins: TypeAlias = Annotated[int, Within(ge=1, le=256)]
Channels: TypeAlias = Annotated[int, Within(ge=0, le=65_536)]
Levels: TypeAlias = Annotated[float, Within(ge=0, le=255)]  # of 0..255
Scale: TypeAlias = Annotated[float, Within(ge=0.01, le=100)]  # of an image's sides
SegmentClasses: TypeAlias = Annotated[int, Within(ge=0, le=LARGEST_CLASSES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentHeadConfig:
    """What turns outputs of some blocks into a class for every pixel.

    `kind`, a key of `models.segmentation_heads.HEADS`:
      "upernet": a feature pyramid of four blocks and UPerHead (mmseg; the released models).
      "setr_pup": progressive upsampling of the last block read (SETR; the paper's table 3).
      "linear": BatchNorm and one linear layer (the probe that DINOv2 and others report).
    """

    kind: Name = shape_setting("upernet")
    # Whose outputs are read, from 1, ascending. Official: base (4, 6, 8, 12), large (8, 12, 16,
    # 24); Hugging Face's BeitForSemanticSegmentation reads (2, 4, 6, 10) of the same weights.
    blocks: tuple[Block, ...] = shape_setting((4, 6, 8, 12))
    channels: Channels = shape_setting(0)  # of the head's convolutions; 0: the encoder's width
    pool_scales: tuple[Bins, ...] = shape_setting((1, 2, 3, 6))  # "upernet" only
    dropout: Rate = 0.1  # of whole channels before the classifiers, in training
    # The auxiliary head, which only training uses: convolutions on the third block's outputs.
    auxiliary_channels: Channels = shape_setting(256)  # 0: no auxiliary head
    auxiliary_convs: Annotated[int, Within(ge=0, le=8)] = shape_setting(1)
    auxiliary_concat: bool = shape_setting(False)
    auxiliary_weight: Annotated[float, Within(ge=0, le=1000)] = 0.4  # of its loss

    def __post_init__(self) -> None:
        check_fields(self)
        check(len(self.blocks) > 0, "blocks", "name at least one")
        ascending = all(low < high for low, high in zip(self.blocks, self.blocks[1:], strict=False))
        check(ascending, "blocks", f"{self.blocks} must ascend")
        check(len(self.pool_scales) > 0, "pool_scales", "name at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentAugmentConfig:
    """Training views of images with label maps (mmseg 0.11's pipeline, in its order).

    A scale U(min_scale, max_scale); a crop of which no class has more than `max_class_share`; a
    horizontal flip; photometric distortion, each step with probability one half.
    """

    min_scale: Scale = 0.5
    max_scale: Scale = 2.0
    # Of the crop's labelled pixels (cat_max_ratio): ten draws are tried; 1: the first is taken.
    max_class_share: Annotated[float, Within(gt=0, le=1)] = 0.75
    flip: bool = True
    brightness: Levels = 32.0  # ± of 255; 0: never
    contrast: Share = 0.5  # a factor from 1 ± this
    saturation: Share = 0.5  # a factor from 1 ± this
    hue: Annotated[int, Within(ge=0, le=90)] = 18  # ±, in units of two degrees (OpenCV's)

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            self.min_scale <= self.max_scale,
            "min_scale",
            f"{self.min_scale} is more than max_scale, {self.max_scale}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentDataConfig(SourceConfig):
    """Images with label maps; `image_size` is the crop's side.

    The scale of an image: its shorter side becomes `short_side`, unless its longer one would be
    more than `long_side`. Training draws a factor of both for every image.
    """

    short_side: Annotated[int, Within(ge=0, le=16_384)] = 0  # pixels; 0: image_size
    long_side: Annotated[int, Within(ge=0, le=65_536)] = 0  # pixels; 0: four times the shorter one
    # Which label (0 to 255) marks pixels that neither train nor count; None: none does.
    ignore_label: Annotated[int, Within(ge=0, le=255)] | None = shape_setting(IGNORE)
    # Label 0 is no class but "anything else", ignored, and label 1 is class 0 (ADE20K's
    # reduce_zero_label).
    zero_is_background: bool = shape_setting(False)
    augment: SegmentAugmentConfig = SegmentAugmentConfig()

    @property
    def shorter(self) -> int:
        """`short_side` with 0 resolved."""
        return self.short_side or self.image_size

    @property
    def longer(self) -> int:
        """`long_side` with 0 resolved."""
        return self.long_side or 4 * self.shorter


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From an image of any size to a class for each of its pixels.

    `mode`:
      "slide": the image keeps its shape; windows of the crop's size slide over it, and their
        logits are averaged where they overlap.
      "whole": the image is squeezed into one square window.
    """

    mode: Annotated[str, OneOf("slide", "whole")] = "slide"
    stride: Pixels = 341  # of the windows
    scales: tuple[Scale, ...] = (1.0,)  # probabilities are averaged over them
    flip: bool = False  # and over mirrored images
    # The shorter side is never less than a window (official SETR_Resize, in multi-scale tests).
    fill_window: bool = False
    tile: Annotated[int, Within(ge=8, le=4096)] = 256  # side of what is computed at once; memory

    def __post_init__(self) -> None:
        check_fields(self)
        check(len(self.scales) > 0, "scales", "name at least one")
