"""BEiT pre-training in JAX/Flax, with export to PyTorch, and trained models as a library.

    import beit_jax

    encoder = beit_jax.load_encoder("runs/base")  # or a Hugging Face folder, .safetensors, .pth
    out = encoder(images_uint8)
    out.cls, out.patches  # [b, d], [b, grid, grid, d]

Importing the package imports nothing else. The names below are looked up when they are first used,
and none of them needs TensorFlow, TensorFlow Datasets, clu or PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit_jax.config import (
        AugmentConfig,
        ClassifyAugmentConfig,
        ConfigError,
        DataConfig,
        LabelledDataConfig,
        MaskConfig,
        MixingConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        RunError,
        SourceConfig,
        TokenizerConfig,
    )
    from beit_jax.pretrained import (
        EncoderOutput,
        PretrainedClassifier,
        PretrainedEncoder,
        PretrainedMaskedImageModel,
        PretrainedSegmenter,
        PretrainedTokenizer,
        load_classifier,
        load_encoder,
        load_masked_image_model,
        load_segmenter,
        load_tokenizer,
    )
    from beit_jax.tokenizers.dalle import DalleConfig
    from beit_jax.tokenizers.dvae import DvaeConfig
    from beit_jax.weights import (
        WeightsError,
        convert_tokenizer,
        export_checkpoint,
        import_checkpoint,
    )

__version__ = "0.1.0"

# One list for type checkers and readers; tests/pretrained_test.py compares it with `_MODULES`.
__all__ = [
    "AugmentConfig",
    "ClassifyAugmentConfig",
    "ConfigError",
    "DalleConfig",
    "DataConfig",
    "DvaeConfig",
    "EncoderOutput",
    "LabelledDataConfig",
    "MaskConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainedClassifier",
    "PretrainedEncoder",
    "PretrainedMaskedImageModel",
    "PretrainedSegmenter",
    "PretrainedTokenizer",
    "RunConfig",
    "RunError",
    "SourceConfig",
    "TokenizerConfig",
    "WeightsError",
    "convert_tokenizer",
    "export_checkpoint",
    "import_checkpoint",
    "load_classifier",
    "load_encoder",
    "load_masked_image_model",
    "load_segmenter",
    "load_tokenizer",
]

# Where a public name is defined, if not in beit_jax.config.
_MODULES = {
    "pretrained": (
        "EncoderOutput",
        "PretrainedClassifier",
        "PretrainedEncoder",
        "PretrainedMaskedImageModel",
        "PretrainedSegmenter",
        "PretrainedTokenizer",
        "load_classifier",
        "load_encoder",
        "load_masked_image_model",
        "load_segmenter",
        "load_tokenizer",
    ),
    "tokenizers.dalle": ("DalleConfig",),
    "tokenizers.dvae": ("DvaeConfig",),
    "weights": ("WeightsError", "convert_tokenizer", "export_checkpoint", "import_checkpoint"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Imports the module that defines a public name when the name is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, 'config')}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
