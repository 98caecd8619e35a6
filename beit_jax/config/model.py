"""The encoder's settings."""

import dataclasses

from beit_jax.config.parse import check, one_of, shape_setting
from beit_jax.types import Setting

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

    layers: int = shape_setting()
    width: int = shape_setting()
    heads: int = shape_setting()
    mlp_width: int = shape_setting()
    image_size: int = shape_setting(224)
    patch_size: int = shape_setting(16)
    positions: str = shape_setting("relative_shared")
    # Initial value of LayerScale's gammas; None for no LayerScale.
    layer_scale_init: float | None = shape_setting(0.1)
    drop_path_rate: float = 0.1
    layer_norm_epsilon: float = shape_setting(1e-6)
    dtype: str = "auto"  # matmuls: "auto" is bfloat16 on accelerators, float32 on CPU
    # "auto": on a TPU the kernel of models/kernels/fused_attention.py where heads are 64 wide, else
    # "xla". "fused", "cudnn" (NVIDIA, untested) or "xla" by name.
    attention: str = "auto"
    residual_dtype: str = "float32"  # the stream between blocks (official: float32 under AMP)
    # Blocks per scan step; 0 for all of them. 1 compiles fastest, 0 runs fastest on TPU.
    scan_unroll: int = 1
    remat: str = "none"  # "none", "dots" (keep matmul results) or "full"

    def __post_init__(self) -> None:
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
        check(self.scan_unroll >= 0, "scan_unroll", "must not be negative; 0 unrolls all blocks")

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
