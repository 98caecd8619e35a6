"""BEiT-B/16 pre-trained and fine-tuned on ImageNet-1k alone: the paper's table 1.

Paper table 13: plain ViT (absolute positions, no LayerScale), repeated augmentation, a rate out of
{2, 3, 4, 5}e-3. Published: top-1 83.2.

    python main.py --config=configs/beit_base_plain_ft1k.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft1k` on the paper's own model."""
    config = beit_base_ft1k.get_config()
    config.reference = "top-1 83.2 (paper table 1)"
    config.run.init_from = "beit_base_patch16_224_pt1k_800ep.pth"
    config.model.positions = "absolute"
    config.model.layer_scale_init = None
    config.data.normalization = "imagenet"  # as the 1k weights were pre-trained
    config.data.repeats = 3  # table 13: repeated augmentation, base only
    return config
