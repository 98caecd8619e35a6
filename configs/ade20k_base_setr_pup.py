"""BEiT-B/16 with SETR-PUP on ADE20K at 512: the paper's own segmentation task (tables 3 and 4).

Table 14: learning rate 1e-3, layer decay 0.65, 160,000 steps of 16 images, 1,500 of warm-up, plain
ViT. Published: mIoU 45.6, after fine-tuning on ImageNet-1k 47.7. Head and config were never
released (unilm issue 443), so the head is mmseg's.

    python main.py --config=configs/ade20k_base_setr_pup.py --config.run.init_from=WEIGHTS

WEIGHTS: a run of `beit_base_plain`, say.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    config = ade20k_base_512.get_config()
    config.reference = "mIoU 45.6 (paper table 3)"
    config.model.positions = "absolute"
    config.model.layer_scale_init = placeholder(float)  # None: a plain ViT
    config.head.kind = "setr_pup"
    config.head.blocks = (12,)
    config.head.channels = 256
    config.head.dropout = 0.0
    config.head.auxiliary_channels = 0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.layer_decay = 0.65
    return config
