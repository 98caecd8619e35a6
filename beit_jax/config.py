"""Settings: frozen dataclasses, and the one place a config file becomes one.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`. `parse` turns it, once, into
the dataclass of the job it names, and rejects unknown keys, missing keys, wrong types and bad
values by the key's full name, before anything is compiled. Below this edge the code sees only
frozen dataclasses: no `config.get(key, default)`.

This file imports nothing from the package, so that every other part may import it.

    config = parse(DataConfig, {"source": "embedded", "image_size": 224, ...}, path="config.data")
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line and starts with the setting's full name."""


class RunError(RuntimeError):
    """A run can't go on. The message is one line and says why and what is safe."""


def check(condition: bool, name: str, message: str) -> None:
    """Raises `ConfigError("name: message")` unless `condition` holds.

    Inside a dataclass' `__post_init__`, `name` is the field's own name; `parse` puts the path of
    the section in front.
    """
    if not condition:
        raise ConfigError(f"{name}: {message}")


def parse(cls: type[T], values: Mapping[str, Any], *, path: str = "config") -> T:
    """Turns nested mappings into the frozen dataclass `cls`.

    Args:
      cls: a dataclass whose fields are int, float, bool, str, tuples of these, other such
        dataclasses, or `X | None`.
      values: mapping from field name to value (a `ConfigDict` or a dict from JSON).
      path: the section's full name, for messages.

    Returns:
      An instance of `cls`.

    Raises:
      ConfigError: an unknown key, a missing key, a wrong type, or a value `cls` rejects.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "keys"):
        raise ConfigError(f"{path}: expected a section with keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{path}.{key}: unknown key; the keys of {path} are: {known}")
    parsed = {}
    for name, field in fields.items():
        if name in values:
            parsed[name] = _value(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: missing")
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


def _value(hint: Any, value: Any, name: str) -> Any:
    """Checks one value against a type hint; ints pass as floats, lists as tuples."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
        return _value(hint, value, name)
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, path=name)
    if origin is tuple:
        item, *_ = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_value(item, each, f"{name}[{i}]") for i, each in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{name}: expected {hint.__name__}, got {value!r} ({type(value).__name__})"
        )
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name}: must be finite, got {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain nested dicts and lists that `parse` and JSON take."""
    plain = dataclasses.asdict(config)

    def listify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listify(item) for key, item in value.items()}
        return [listify(item) for item in value] if isinstance(value, tuple) else value

    return listify(plain)


def one_of(value: str, name: str, *options: str) -> None:
    """Raises `ConfigError` unless `value` is among `options`."""
    check(value in options, name, f"must be one of {', '.join(options)}; got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder. Sizes: paper §2.4 (base, large); tiny and small follow DeiT.

    `positions` chooses the architecture's position information:
      "relative_shared": one relative-position-bias table for all blocks (BEiT+ pre-training).
      "relative_per_block": a table per block (BEiT+ fine-tuning).
      "absolute": learned absolute embeddings (the paper's plain ViT, tables 1 to 4).
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 16
    positions: str = "relative_shared"
    layer_scale_init: float | None = 0.1  # gamma's start; None: no LayerScale
    drop_path_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    dtype: str = "auto"  # matmuls: "auto" is bfloat16 on accelerators, float32 on CPU
    # "auto": on a TPU the kernel of models/fused_attention.py where heads are 64 wide, else "xla".
    # "fused", "cudnn" (NVIDIA, untested) or "xla" by name.
    attention: str = "auto"
    residual_dtype: str = "float32"  # the stream between blocks (official: float32 under AMP)
    scan_unroll: int = 1  # blocks per scan step: 1 compiles fastest, `layers` runs fastest on TPU
    remat: str = "none"  # "none", "dots" (keep matmul results) or "full"

    def __post_init__(self):
        for name in ("layers", "width", "heads", "mlp_width", "image_size", "patch_size"):
            check(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        check(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"{self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        check(
            self.width % self.heads == 0,
            "width",
            f"{self.width} is not a multiple of heads {self.heads}",
        )
        one_of(self.positions, "positions", "relative_shared", "relative_per_block", "absolute")
        one_of(self.dtype, "dtype", "auto", "float32", "bfloat16")
        one_of(self.residual_dtype, "residual_dtype", "float32", "bfloat16")
        one_of(self.attention, "attention", "auto", "fused", "xla", "cudnn")
        check(
            self.attention != "fused" or self.width == 64 * self.heads,
            "attention",
            f'"fused" takes heads 64 wide, these are {self.width / self.heads:g}',
        )
        one_of(self.remat, "remat", "none", "dots", "full")
        check(0 <= self.drop_path_rate < 1, "drop_path_rate", "must be in [0, 1)")
        check(self.scan_unroll >= 1, "scan_unroll", "must be at least 1")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches in an image, without the class token."""
        return self.grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The frozen tokenizer that names the targets.

    `kind` "dalle": the DALL-E dVAE (openai/DALL-E), stride 8, vocabulary 8192. "dvae": own discrete
    VAE (modeling_discrete_vae.py), trained with `tasks/tokenizer.py`, stride 2**levels.
    """

    kind: str
    path: str = ""  # safetensors file; "" with `random_weights` only
    random_weights: bool = False  # for trying the machinery: ids then mean nothing
    vocabulary: int = 8192
    image_size: int = 112
    # Of the convolutions: "auto" is bfloat16 on accelerators, float32 on CPU. The last one, which
    # scores the tokens, is always float32. Ids near ties depend on it (bench/tokenizer.py).
    dtype: str = "auto"
    width: int = 256  # hidden channels (both kinds)
    levels: int = 3  # dvae: halvings
    codebook_width: int = 512  # dvae
    sha256: str = ""  # of the file at `path`; "" means not checked

    def __post_init__(self):
        one_of(self.kind, "kind", "dalle", "dvae")
        one_of(self.dtype, "dtype", "auto", "float32", "bfloat16")
        check(self.vocabulary > 1, "vocabulary", f"must be at least 2, got {self.vocabulary}")
        check(
            self.image_size > 0 and self.image_size % self.stride == 0,
            "image_size",
            f"{self.image_size} is not a positive multiple of the stride {self.stride}",
        )
        check(self.width > 0 and self.width % 4 == 0, "width", "must be a multiple of 4")

    @property
    def stride(self) -> int:
        """Pixels of the token view per token, along one side."""
        return 8 if self.kind == "dalle" else 2**self.levels

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are hidden (masking_generator.py; paper algorithm 1).

    `kind`:
      "block": the official generator: at most `count`, never more.
      "block_exact": the same, then forced to exactly `count` (BEiT v2's).
      "block_paper": Algorithm 1 as printed: uniform aspect, loop until more than `ratio` is masked.
      "random": exactly `count` patches, uniformly (table 4's ablation).
    """

    kind: str = "block"
    count: int = 75  # official num_mask_patches for 14 x 14
    ratio: float = 0.4  # "block_paper" only
    min_block: int = 16
    max_block: int | None = None  # None: no limit but what is left
    min_aspect: float = 0.3  # aspect in [min_aspect, 1 / min_aspect]

    def __post_init__(self):
        one_of(self.kind, "kind", "block", "block_exact", "block_paper", "random")
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

    def __post_init__(self):
        check(
            0 < self.min_crop_scale <= self.max_crop_scale <= 1,
            "min_crop_scale",
            f"need 0 < min_crop_scale <= max_crop_scale <= 1, got {self.min_crop_scale} and "
            f"{self.max_crop_scale}",
        )
        one_of(self.fidelity, "fidelity", "official", "fast")
        for name in ("brightness", "contrast", "saturation"):
            check(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images come from, and how they are read.

    `source`: "embedded[:N]" (made by code), "folder:PATH" (images at any depth, local or gs://; the
    first folder under PATH is an image's class, for jobs that need one), "prepared:PATH" (what
    `data/prepare.py` wrote), "tfds:NAME" (any TFDS data set with an image feature).
    `eval_source`: the held-out images; "" withholds `holdout` images of `source` from training (not
    of a TFDS data set).
    """

    source: str
    split: str = "train"  # tfds only
    eval_source: str = ""
    eval_split: str = "validation"  # tfds only
    holdout: int = 0  # images of `source` kept for evaluation where eval_source is ""
    image_size: int = 224  # what the encoder is given
    normalization: str = "half"  # "half": mean = std = 0.5; "imagenet"
    max_bad_share: float = 0.01  # of the images read; more that can't be decoded end the run
    exif_orientation: bool = True  # turn photographs upright; the official loader does not
    workers: int = 0  # parallel decoders; 0: as many as cores
    prefetch: int = 2  # batches ahead
    service: tuple[str, ...] = ()  # host:port of machines that make the batches (`data/service.py`)

    def __post_init__(self):
        one_of(self.normalization, "normalization", "half", "imagenet")
        check(self.image_size > 0, "image_size", "must be positive")
        check(0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]")
        check(self.holdout >= 0, "holdout", "must not be negative")
        check(self.workers >= 0, "workers", "must not be negative")
        check(self.prefetch >= 0, "prefetch", "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Images for pre-training, and what becomes of them: two views and a mask.

    `augmentation_cycle` K repeats the views of K epochs again and again: an image's crop, flip and
    jitter are then functions of (seed, epoch mod K, index), and so is the order; masks stay new in
    every epoch. Token ids are kept from the first K epochs on (two bytes a patch: ImageNet-1k at
    K = 32 takes 16 GB, divided over the hosts) and the tokenizer, a third of BEiT-B's FLOPs, is
    skipped ever after. What it gives up: an image has K different views, not one for each epoch,
    and an epoch is whole batches (what is left over is not seen in it).
    """

    token_image_size: int = 112  # view 2, for the tokenizer
    augmentation_cycle: int = 0  # K; 0: every epoch has views of its own
    token_cache: str = ""  # a folder on each host's disk for the ids; "": WORKDIR/token_cache
    augment: AugmentConfig = AugmentConfig()
    mask: MaskConfig = MaskConfig()

    def __post_init__(self):
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

    def __post_init__(self):
        check(
            0 < self.min_crop_scale <= self.max_crop_scale <= 1,
            "min_crop_scale",
            f"need 0 < min_crop_scale <= max_crop_scale <= 1, got {self.min_crop_scale} and "
            f"{self.max_crop_scale}",
        )
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

    def __post_init__(self):
        super().__post_init__()
        check(self.repeats >= 1, "repeats", "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup and CutMix (timm's `Mixup`, mode "batch").

    A batch is cut into `groups`, each mixed with itself reversed: a GPU's part of the batch in the
    official code. Given by config and not by the number of devices, so that the numbers don't
    depend on it; where a group lies on several devices, its images travel.
    """

    mixup: float = 0.8  # both parameters of the Beta distribution; 0: no mixup
    cutmix: float = 1.0  # likewise; 0: no CutMix
    probability: float = 1.0  # that a group is mixed at all
    switch_probability: float = 0.5  # of CutMix, where both are on
    groups: int = 1

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("probability", "switch_probability"):
            check(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")
        check(self.groups >= 1, "groups", "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (paper table 12). The learning rate is absolute: it is not scaled with the batch."""

    learning_rate: float  # peak
    min_learning_rate: float = 1e-5  # the cosine's end
    warmup_steps: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float | None = None  # global norm; None: no clipping
    accumulate: int = 1  # micro-batches per step
    max_bad_steps: int = 10  # non-finite updates in a row that end the run
    layer_decay: float = 1.0  # rate times this for each layer further from the head; 1: the same
    decay_relative_positions: bool = True  # weight decay of the relative-position tables
    hold_steps: int = 1  # the rate changes only every so many steps
    ema_decay: float | None = None  # a moving average of the parameters, evaluated too; None: none

    def __post_init__(self):
        check(self.learning_rate > 0, "learning_rate", "must be positive")
        check(self.min_learning_rate >= 0, "min_learning_rate", "must not be negative")
        check(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        check(self.accumulate >= 1, "accumulate", "must be at least 1")
        check(self.max_bad_steps >= 1, "max_bad_steps", "must be at least 1")
        check(self.weight_decay >= 0, "weight_decay", "must not be negative")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive or None")
        check(0 < self.layer_decay <= 1, "layer_decay", "must be in (0, 1]")
        check(self.hold_steps >= 1, "hold_steps", "must be at least 1")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "must be in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batch, devices, logging and checkpoints: what every job has."""

    steps: int
    batch_size: int  # global
    seed: int = 0
    fsdp: int = 1  # devices over which parameters are sharded; the rest are data-parallel
    log_every: int = 50  # steps
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 0  # 0: every held-out image
    picture_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 1000  # steps; 0: no
    checkpoint_minutes: float = 10.0  # this often too (several hosts: at logged steps); 0: no
    keep_checkpoints: int = 3
    # Weights to start from: another run's workdir or checkpoint, a Hugging Face folder, a
    # .safetensors of timm, a .pth of unilm.
    init_from: str = ""
    init_allow_missing: tuple[str, ...] = ()  # parameters init_from may lack; they start fresh
    init_allow_unused: tuple[str, ...] = ()  # parameters of init_from that may be left out
    on_corrupt_checkpoint: str = "fall_back"  # to the one before; or "fail"
    print_sharding: bool = False  # which part of each parameter a device holds, at the start
    # Where compiled programs are kept, see `training.startup.keep_compiled`: "auto", a folder, or
    # "" for what JAX's own settings say.
    compilation_cache: str = "auto"

    def __post_init__(self):
        check(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        check(self.batch_size >= 1, "batch_size", f"must be at least 1, got {self.batch_size}")
        check(self.fsdp >= 1, "fsdp", f"must be at least 1, got {self.fsdp}")
        check(self.log_every >= 1, "log_every", "must be at least 1")
        check(self.keep_checkpoints >= 2, "keep_checkpoints", "keep at least 2: one may be damaged")
        one_of(self.on_corrupt_checkpoint, "on_corrupt_checkpoint", "fall_back", "fail")
        for name in ("eval_every", "eval_batches", "picture_every", "checkpoint_every"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        check(self.checkpoint_minutes >= 0, "checkpoint_minutes", "must not be negative")
