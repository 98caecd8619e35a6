"""BEiT-L/16 as in the paper's tables 1 to 4: a plain ViT on ImageNet-1k, 800 epochs.

python main.py --config=configs/beit_large_plain.py --config.tokenizer.path=dalle.safetensors
"""

from ml_collections import ConfigDict

from configs import beit_large


def get_config() -> ConfigDict:
    """`beit_large` without what the release added to the paper's model."""
    config = beit_large.get_config()
    config.model.positions = "absolute"
    config.model.layer_scale_init = None
    return config
