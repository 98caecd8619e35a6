"""Settings: frozen dataclasses by subject, and `parse`, which turns a config file into one."""

from beit_jax.config.data import (
    AugmentConfig,
    ClassifyAugmentConfig,
    DataConfig,
    LabelledDataConfig,
    MaskConfig,
    MixingConfig,
    SourceConfig,
)
from beit_jax.config.model import ModelConfig
from beit_jax.config.optimizer import OptimizerConfig
from beit_jax.config.parse import (
    Choice,
    ConfigError,
    RunError,
    check,
    fixed_settings,
    fixes,
    may_change,
    once_setting,
    one_of,
    parse,
    presence_setting,
    shape_setting,
    to_dict,
    unit_setting,
)
from beit_jax.config.run import RunConfig
from beit_jax.config.segment import (
    InferenceConfig,
    SegmentAugmentConfig,
    SegmentDataConfig,
    SegmentHeadConfig,
)
from beit_jax.config.tokenizer import TokenizerConfig

__all__ = [
    "AugmentConfig",
    "Choice",
    "ClassifyAugmentConfig",
    "ConfigError",
    "DataConfig",
    "InferenceConfig",
    "LabelledDataConfig",
    "MaskConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunError",
    "SegmentAugmentConfig",
    "SegmentDataConfig",
    "SegmentHeadConfig",
    "SourceConfig",
    "TokenizerConfig",
    "check",
    "fixed_settings",
    "fixes",
    "may_change",
    "once_setting",
    "one_of",
    "parse",
    "presence_setting",
    "shape_setting",
    "to_dict",
    "unit_setting",
]
