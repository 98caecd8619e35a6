"""The encoder's settings."""

import dataclasses
from typing import Annotated

from beit_jax.config.bounds import OneOf, Pixels, Rate, Within, check_fields
from beit_jax.config.parse import check, shape_setting
from beit_jax.types import Setting

# Patches along a side. Attention and position tables take memory by its fourth power.
LARGEST_GRID = 256

# Paper §2.4 (base, large). The paper has no smaller model: tiny and small are DeiT's
# (arXiv 2012.12877, table 1).
_TINY: dict[str, Setting] = {"layers": 12, "width": 192, "heads": 3, "mlp_width": 768}
_SMALL: dict[str, Setting] = {"layers": 12, "width": 384, "heads": 6, "mlp_width": 1536}
_BASE: dict[str, Setting] = {"layers": 12, "width": 768, "heads": 12, "mlp_width": 3072}
_LARGE: dict[str, Setting] = {"layers": 24, "width": 1024, "heads": 16, "mlp_width": 4096}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder.

        ModelConfig.base(positions="absolute", layer_scale_init=None)  # the paper's plain ViT-B

    `positions` chooses the architecture's position information:
      "relative_shared": one relative-position-bias table for all blocks (BEiT+ pre-training).
      "relative_per_block": a table per block (BEiT+ fine-tuning).
      "absolute": learned absolute embeddings (the paper's plain ViT, tables 1 to 4).
    """

    layers: Annotated[int, Within(ge=1, le=1000)] = shape_setting()
    width: Annotated[int, Within(ge=1, le=65_536)] = shape_setting()
    heads: Annotated[int, Within(ge=1, le=4096)] = shape_setting()
    mlp_width: Annotated[int, Within(ge=1, le=1_048_576)] = shape_setting()
    image_size: Pixels = shape_setting(224)
    patch_size: Pixels = shape_setting(16)
    positions: Annotated[str, OneOf("relative_shared", "relative_per_block", "absolute")] = (
        shape_setting("relative_shared")
    )
    # Initial value of LayerScale's gammas; None for no LayerScale.
    layer_scale_init: Annotated[float, Within(ge=0, le=1000)] | None = shape_setting(0.1)
    drop_path_rate: Rate = 0.1
    layer_norm_epsilon: Annotated[float, Within(gt=0, le=1)] = shape_setting(1e-6)
    # Of matmuls: "auto" is bfloat16 on accelerators, float32 on CPU.
    dtype: Annotated[str, OneOf("auto", "float32", "bfloat16")] = "auto"
    # "auto": on a TPU the kernel of models/kernels/fused_attention.py where heads are 64 wide, else
    # "xla". "fused", "cudnn" (NVIDIA, untested) or "xla" by name.
    attention: Annotated[str, OneOf("auto", "fused", "xla", "cudnn")] = "auto"
    # Of the stream between blocks (official: float32 under AMP).
    residual_dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    # Blocks per scan step; 0 for all of them. 1 compiles fastest, 0 runs fastest on TPU.
    scan_unroll: Annotated[int, Within(ge=0, le=1000)] = 1
    # "dots" keeps the results of matmuls.
    remat: Annotated[str, OneOf("none", "dots", "full")] = "none"

    def __post_init__(self) -> None:
        check_fields(self)
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
        check(
            self.attention != "fused" or self.width == 64 * self.heads,
            "attention",
            f'"fused" takes heads 64 wide, these are {self.width / self.heads:g}',
        )
        check(
            self.grid <= LARGEST_GRID,
            "image_size",
            f"{self.grid} × {self.grid} patches are more than {LARGEST_GRID} × {LARGEST_GRID}",
        )

    @classmethod
    def tiny(cls, **changes: Setting) -> "ModelConfig":
        """DeiT-Ti's sizes; `changes` are other settings, or these."""
        return cls(**(_TINY | changes))

    @classmethod
    def small(cls, **changes: Setting) -> "ModelConfig":
        """DeiT-S's sizes; `changes` are other settings, or these."""
        return cls(**(_SMALL | changes))

    @classmethod
    def base(cls, **changes: Setting) -> "ModelConfig":
        """BEiT-B's sizes; `changes` are other settings, or these."""
        return cls(**(_BASE | changes))

    @classmethod
    def large(cls, **changes: Setting) -> "ModelConfig":
        """BEiT-L's sizes; `changes` are other settings, or these."""
        return cls(**(_LARGE | changes))

    @property
    def sizes(self) -> dict[str, int]:
        """The settings in which base and large differ: layers, width, heads, mlp_width."""
        return {name: getattr(self, name) for name in _BASE}

    @property
    def blocks_per_step(self) -> int:
        """Blocks that one step of the scan computes: `scan_unroll` with 0 resolved."""
        return min(self.scan_unroll or self.layers, self.layers)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches in an image; the class token is not counted."""
        return self.grid**2
