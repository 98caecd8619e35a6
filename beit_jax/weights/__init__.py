"""Weights in and out: Hugging Face, timm, the official unilm format, and DALL-E's tokenizer.

    python -m beit_jax.weights --help

The same as functions:

    from beit_jax import weights

    weights.export_checkpoint("runs/beit_base", format="hugging_face", output="exported")
    weights.import_checkpoint("beit_base_patch16_224_pt22k.pth", output="imported")
    weights.convert_tokenizer(encoder="encoder.pkl", output="dalle.safetensors")

Nothing here needs TensorFlow. Only writing a `.pth` needs PyTorch; a pickle is read without it and
without running code from it (`pickles`). The names below are imported on first use, so that reading
a file of weights imports neither Orbax nor the tokenizers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit_jax.weights.convert import export_checkpoint as export_checkpoint
    from beit_jax.weights.convert import import_checkpoint as import_checkpoint
    from beit_jax.weights.convert import restore_params as restore_params
    from beit_jax.weights.dalle import convert_tokenizer as convert_tokenizer
    from beit_jax.weights.report import Report as Report
    from beit_jax.weights.report import WeightsError as WeightsError

_MODULES = {
    "Report": "report",
    "WeightsError": "report",
    "convert_tokenizer": "dalle",
    "export_checkpoint": "convert",
    "import_checkpoint": "convert",
    "restore_params": "convert",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
