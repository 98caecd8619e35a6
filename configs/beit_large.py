"""BEiT-L/16 on ImageNet-1k, 800 epochs (BEiT+).

arXiv 2106.08254 table 12. The official README has no command for large; depth, width and clipping
are the paper's, LayerScale's start is the README's for large models.

    python main.py --config=configs/beit_large.py --config.tokenizer.path=dalle.safetensors

Published: 85.2 % top-1 after fine-tuning at 224 (table 1, plain ViT).
"""

from ml_collections import ConfigDict

from beit_jax.config import ModelConfig
from configs import beit_base


def get_config() -> ConfigDict:
    """`beit_base` with a larger model and a tighter clip."""
    config = beit_base.get_config()
    config.model.update(ModelConfig.large().sizes)  # 24 layers of 1024: paper §2.4
    config.model.layer_scale_init = 1e-5  # README: --layer_scale_init_value 1e-5 for large
    config.optimizer.clip_norm = 1.0  # paper table 12, large
    return config
