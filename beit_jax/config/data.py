"""Settings of the images: sources, views, masks."""

import dataclasses
from typing import Annotated, TypeAlias

from beit_jax.config.bounds import (
    Address,
    Count,
    Matching,
    Name,
    OneOf,
    PathOrNone,
    Pixels,
    Share,
    Whole,
    Within,
    check_fields,
)
from beit_jax.config.model import LARGEST_GRID
from beit_jax.config.parse import check, shape_setting
from beit_jax.preprocessing import MAX_PIXELS, NORMALIZATIONS

Patches: TypeAlias = Annotated[int, Within(ge=1, le=LARGEST_GRID**2)]
AreaShare: TypeAlias = Annotated[float, Within(gt=0, le=1)]
# Both parameters of the Beta distribution.
BetaParameter: TypeAlias = Annotated[float, Within(ge=0, le=1000)]
# A path may hold whatever a file system takes; each kind checks its value (`data/source_kinds.py`).
_SOURCE = Matching(
    pattern=r"[A-Za-z][\w-]*(:[^\0-\x1f\x7f]*)?", what="KIND or KIND:VALUE", longest=4200
)
ImageSource: TypeAlias = Annotated[str, _SOURCE]
ImageSourceOrNone: TypeAlias = Annotated[str, dataclasses.replace(_SOURCE, empty=True)]
# TFDS's language: "train", "train[:5000]", "train[80%:]+validation".
Split: TypeAlias = Annotated[
    str, Matching(pattern=r"\w[\w.+:%\[\]() -]*", what='a split such as "train[:5000]"')
]


def _check_crop_scale(smallest: float, largest: float) -> None:
    check(
        smallest <= largest,
        "min_crop_scale",
        f"{smallest} is more than max_crop_scale, {largest}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are hidden (masking_generator.py; paper algorithm 1).

    `kind`, a key of `data.masking.KINDS`, which jobs that draw masks check:
      "block": the official generator: at most `count`, never more.
      "block_exact": the same, then forced to exactly `count` (BEiT v2's).
      "block_paper": Algorithm 1 as printed: uniform aspect, loop until more than `ratio` is masked.
      "random": exactly `count` patches, uniformly (table 4's ablation).
    """

    kind: Name = "block"
    count: Patches = 75  # official num_mask_patches for 14 x 14
    ratio: Annotated[float, Within(gt=0, lt=1)] = 0.4  # "block_paper" only
    min_block: Patches = 16
    max_block: Patches | None = None  # None: limited only by the patches left to mask
    # Aspect in [min_aspect, 1 / min_aspect]; flatter blocks than 1 by 1000 fit no grid.
    min_aspect: Annotated[float, Within(ge=0.001, le=1)] = 0.3

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Pre-training views (datasets.py:27-75): jitter, flip, one crop box for both views.

    `fidelity`:
      "official": as Pillow makes them, with a mean difference of 0.35 of 255.
      "fast": of a JPEG only the crop is decoded, at half the resolution or less where that still
        fills the view; view 2 is made from view 1; the jitter, on the device, comes after resizing
        and takes contrast's mean from the crop. bench/input.py measures both.
    """

    min_crop_scale: AreaShare = 0.08  # of the crop; BEiT v2: 0.2
    max_crop_scale: AreaShare = 1.0
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    flip: bool = True
    fidelity: Annotated[str, OneOf("official", "fast")] = "official"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_crop_scale(self.min_crop_scale, self.max_crop_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images come from, and how they are read.

    `source`: "embedded[:N]" (made by code), "folder:PATH" (images at any depth, local or gs://; the
    first folder under PATH is an image's class, for jobs that need one), "pairs:FOLDER" (of
    `images` and `labels`, or "pairs:IMAGES,LABELS": with label maps), "prepared:PATH" (written by
    `data/prepare.py`), "tfds:NAME" (any TFDS data set with an image feature).
    `eval_source`: the held-out images; "" withholds `holdout` images of `source` from training (not
    of a TFDS data set).
    """

    source: ImageSource
    split: Split = "train"  # tfds only
    eval_source: ImageSourceOrNone = ""
    eval_split: Split = "validation"  # tfds only
    holdout: Whole = 0  # images of `source` kept for evaluation where eval_source is ""
    image_size: Pixels = 224  # of the encoder's view, in pixels
    normalization: Annotated[str, OneOf(table=NORMALIZATIONS)] = shape_setting("half")
    max_bad_share: Share = 0.01  # of the images read; more that can't be decoded end the run
    max_pixels: Count = MAX_PIXELS  # of an image, height times width; larger ones count as bad
    exif_orientation: bool = True  # turn photographs upright; the official loader does not
    workers: Annotated[int, Within(ge=0, le=1024)] = 0  # parallel decoders; 0: as many as cores
    prefetch: Annotated[int, Within(ge=0, le=256)] = 2  # batches ahead
    service: tuple[Address, ...] = ()  # of machines that make the batches (`data/service.py`)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Images for pre-training, of which two views and a mask are made.

    `augmentation_cycle` K repeats the views of K epochs again and again: an image's crop, flip and
    jitter are then functions of (seed, epoch mod K, index), and so is the order; masks stay new in
    every epoch. Token ids are kept from the first K epochs on (two bytes a patch: ImageNet-1k at
    K = 32 takes 16 GB, divided over the hosts) and the tokenizer, a third of BEiT-B's FLOPs, is
    skipped from then on. The cost: an image has K different views instead of a new one in every
    epoch, and an epoch is whole batches (the remainder is not seen in it).
    """

    token_image_size: Pixels = 112  # view 2, for the tokenizer
    # K; 0: new views in every epoch.
    augmentation_cycle: Annotated[int, Within(ge=0, le=10_000)] = 0
    # A folder on each host's disk for the ids; "": WORKDIR/token_cache.
    token_cache: PathOrNone = ""
    augment: AugmentConfig = AugmentConfig()
    mask: MaskConfig = MaskConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check("://" not in self.token_cache, "token_cache", "must be a folder on a local disk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyAugmentConfig:
    """Training views for classification (timm 0.3.2's `create_transform`, datasets.py:127-169).

    Crop and flip, RandAugment ("rand-m9-mstd0.5-inc1" is the default), random erasing. Colour
    jitter is not in the recipe: timm leaves it out where RandAugment is on.
    """

    min_crop_scale: AreaShare = 0.08  # of the crop
    max_crop_scale: AreaShare = 1.0
    # Of the crop; "bilinear" in the linear probe.
    interpolation: Annotated[str, OneOf("bicubic", "bilinear")] = "bicubic"
    flip: bool = True
    # Of RandAugment, per image; 0: no RandAugment.
    operations: Annotated[int, Within(ge=0, le=100)] = 2
    magnitude: Annotated[float, Within(ge=0, le=10)] = 9.0
    magnitude_std: Annotated[float, Within(ge=0, le=100)] = 0.5
    operation_probability: Share = 0.5
    erase_probability: Share = 0.25  # a box of noise, after normalisation; 0: no erasing
    # Share of the resized side; None: 224/256 under 384, else 1.
    eval_crop: Annotated[float, Within(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_crop_scale(self.min_crop_scale, self.max_crop_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(SourceConfig):
    """Images with their classes."""

    # Differently augmented copies of an image in an epoch (repeated augmentation).
    repeats: Annotated[int, Within(ge=1, le=1000)] = 1
    augment: ClassifyAugmentConfig = ClassifyAugmentConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup and CutMix (timm's `Mixup`, mode "batch").

    A batch is cut into `groups`, each mixed with itself reversed: a GPU's part of the batch in the
    official code. The number of groups is a setting, not the number of devices, so that results do
    not depend on the hardware; a group that spans several devices costs communication.
    """

    mixup: BetaParameter = 0.8  # 0: no mixup
    cutmix: BetaParameter = 1.0  # 0: no CutMix
    probability: Share = 1.0  # that a group is mixed at all
    switch_probability: Share = 0.5  # of CutMix, where both are on
    groups: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)
