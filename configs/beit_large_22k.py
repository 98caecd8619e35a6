"""BEiT-L/16 on ImageNet-22k, 150 epochs: the released `beit_large_patch16_224_pt22k`.

README for data and schedule (given for base), paper table 12 for the model and the clip.

    python main.py --config=configs/beit_large_22k.py --config.data.source=folder:/data/imagenet22k
"""

from ml_collections import ConfigDict

from configs import beit_base_22k, beit_large


def get_config() -> ConfigDict:
    """`beit_base_22k` with `beit_large`'s model and clip."""
    large = beit_large.get_config()
    config = beit_base_22k.get_config()
    for key, value in large.model.items():
        config.model[key] = value
    config.optimizer.clip_norm = large.optimizer.clip_norm
    return config
