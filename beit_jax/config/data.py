"""Settings of the images: sources, views, masks."""

import dataclasses

from beit_jax.config.parse import check, one_of, shape_setting
from beit_jax.preprocessing import MAX_PIXELS, NORMALIZATIONS


def _check_crop_scale(smallest: float, largest: float) -> None:
    check(
        0 < smallest <= largest <= 1,
        "min_crop_scale",
        f"need 0 < min_crop_scale <= max_crop_scale <= 1, got {smallest} and {largest}",
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

    kind: str = "block"
    count: int = 75  # official num_mask_patches for 14 x 14
    ratio: float = 0.4  # "block_paper" only
    min_block: int = 16
    max_block: int | None = None  # None: limited only by the patches left to mask
    min_aspect: float = 0.3  # aspect in [min_aspect, 1 / min_aspect]

    def __post_init__(self) -> None:
        check(self.count >= 1, "count", f"must be at least 1, got {self.count}")
        check(0 < self.ratio < 1, "ratio", f"must be in (0, 1), got {self.ratio}")
        check(self.min_block >= 1, "min_block", f"must be at least 1, got {self.min_block}")
        check(0 < self.min_aspect <= 1, "min_aspect", "must be in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Pre-training views (datasets.py:27-75): jitter, flip, one crop box for both views.

    `fidelity`:
      "official": as Pillow makes them, with a mean difference of 0.35 of 255.
      "fast": of a JPEG only the crop is decoded, at half the resolution or less where that still
        fills the view; view 2 is made from view 1; the jitter, on the device, comes after resizing
        and takes contrast's mean from the crop. bench/input.py measures both.
    """

    min_crop_scale: float = 0.08  # area share of the crop; BEiT v2: 0.2
    max_crop_scale: float = 1.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    flip: bool = True
    fidelity: str = "official"  # or "fast"

    def __post_init__(self) -> None:
        _check_crop_scale(self.min_crop_scale, self.max_crop_scale)
        one_of(self.fidelity, "fidelity", "official", "fast")
        for name in ("brightness", "contrast", "saturation"):
            check(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images come from, and how they are read.

    `source`: "embedded[:N]" (made by code), "folder:PATH" (images at any depth, local or gs://; the
    first folder under PATH is an image's class, for jobs that need one), "prepared:PATH"
    (written by `data/prepare.py`), "tfds:NAME" (any TFDS data set with an image feature).
    `eval_source`: the held-out images; "" withholds `holdout` images of `source` from training (not
    of a TFDS data set).
    """

    source: str
    split: str = "train"  # tfds only
    eval_source: str = ""
    eval_split: str = "validation"  # tfds only
    holdout: int = 0  # images of `source` kept for evaluation where eval_source is ""
    image_size: int = 224  # of the encoder's view, in pixels
    normalization: str = shape_setting("half")  # a key of `preprocessing.NORMALIZATIONS`
    max_bad_share: float = 0.01  # of the images read; more that can't be decoded end the run
    max_pixels: int = MAX_PIXELS  # of an image, height times width; larger ones count as bad
    exif_orientation: bool = True  # turn photographs upright; the official loader does not
    workers: int = 0  # parallel decoders; 0: as many as cores
    prefetch: int = 2  # batches ahead
    service: tuple[str, ...] = ()  # host:port of machines that make the batches (`data/service.py`)

    def __post_init__(self) -> None:
        one_of(self.normalization, "normalization", *NORMALIZATIONS)
        check(self.image_size > 0, "image_size", "must be positive")
        check(0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]")
        check(self.max_pixels >= 1, "max_pixels", "must be positive")
        check(self.holdout >= 0, "holdout", "must not be negative")
        check(self.workers >= 0, "workers", "must not be negative")
        check(self.prefetch >= 0, "prefetch", "must not be negative")


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

    token_image_size: int = 112  # view 2, for the tokenizer
    augmentation_cycle: int = 0  # K; 0: new views in every epoch
    token_cache: str = ""  # a folder on each host's disk for the ids; "": WORKDIR/token_cache
    augment: AugmentConfig = AugmentConfig()
    mask: MaskConfig = MaskConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.token_image_size > 0, "token_image_size", "must be positive")
        check(self.augmentation_cycle >= 0, "augmentation_cycle", "must not be negative")
        check("://" not in self.token_cache, "token_cache", "must be a folder on a local disk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyAugmentConfig:
    """Training views for classification (timm 0.3.2's `create_transform`, datasets.py:127-169).

    Crop and flip, RandAugment ("rand-m9-mstd0.5-inc1" is the default), random erasing. Colour
    jitter is not in the recipe: timm leaves it out where RandAugment is on.
    """

    min_crop_scale: float = 0.08  # area share of the crop
    max_crop_scale: float = 1.0
    interpolation: str = "bicubic"  # of the crop; "bilinear" in the linear probe
    flip: bool = True
    operations: int = 2  # of RandAugment, per image; 0: no RandAugment
    magnitude: float = 9.0  # of 10
    magnitude_std: float = 0.5
    operation_probability: float = 0.5
    erase_probability: float = 0.25  # a box of noise, after normalisation; 0: no erasing
    eval_crop: float | None = None  # share of the resized side; None: 224/256 under 384, else 1

    def __post_init__(self) -> None:
        _check_crop_scale(self.min_crop_scale, self.max_crop_scale)
        one_of(self.interpolation, "interpolation", "bicubic", "bilinear")
        check(self.operations >= 0, "operations", "must not be negative")
        check(0 <= self.magnitude <= 10, "magnitude", "must be in [0, 10]")
        check(self.magnitude_std >= 0, "magnitude_std", "must not be negative")
        for name in ("operation_probability", "erase_probability"):
            check(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")
        check(self.eval_crop is None or 0 < self.eval_crop <= 1, "eval_crop", "must be in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(SourceConfig):
    """Images with their classes."""

    repeats: int = 1  # differently augmented copies of an image in an epoch (repeated augmentation)
    augment: ClassifyAugmentConfig = ClassifyAugmentConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.repeats >= 1, "repeats", "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup and CutMix (timm's `Mixup`, mode "batch").

    A batch is cut into `groups`, each mixed with itself reversed: a GPU's part of the batch in the
    official code. The number of groups is a setting, not the number of devices, so that results do
    not depend on the hardware; a group that spans several devices costs communication.
    """

    mixup: float = 0.8  # both parameters of the Beta distribution; 0: no mixup
    cutmix: float = 1.0  # as for mixup; 0: no CutMix
    probability: float = 1.0  # that a group is mixed at all
    switch_probability: float = 0.5  # of CutMix, where both are on
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("probability", "switch_probability"):
            check(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")
        check(self.groups >= 1, "groups", "must be at least 1")
