"""Weights in and out: Hugging Face, timm, the official unilm format, and DALL-E's tokenizer.

    python -m beit_jax.weights --help

The same as functions:

    from beit_jax import weights

    weights.export_checkpoint("runs/beit_base", format="hugging_face", output="exported")
    weights.import_checkpoint("beit_base_patch16_224_pt22k.pth", output="imported")
    weights.convert_tokenizer(encoder="encoder.pkl", output="dalle.safetensors")

Nothing here needs TensorFlow. Only writing a `.pth` needs PyTorch; a pickle is read without it and
without running code from it (`pickles`).
"""

from beit_jax.weights.convert import export_checkpoint, import_checkpoint, restore_params
from beit_jax.weights.dalle import convert_tokenizer
from beit_jax.weights.report import Report, WeightsError

__all__ = [
    "Report",
    "WeightsError",
    "convert_tokenizer",
    "export_checkpoint",
    "import_checkpoint",
    "restore_params",
]
