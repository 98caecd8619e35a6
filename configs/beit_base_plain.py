"""BEiT-B/16 as in the paper's tables 1 to 4: a plain ViT on ImageNet-1k, 800 epochs.

Absolute positions, no LayerScale; official flags: --disable_rel_pos_bias --abs_pos_emb
--layer_scale_init_value 0. The released `beit_base_patch16_224_pt1k_800ep`.

    python main.py --config=configs/beit_base_plain.py --config.tokenizer.path=dalle.safetensors
"""

from ml_collections import ConfigDict

from configs import beit_base


def get_config() -> ConfigDict:
    """`beit_base` without what the release added to the paper's model."""
    config = beit_base.get_config()
    config.model.positions = "absolute"
    config.model.layer_scale_init = None
    return config
