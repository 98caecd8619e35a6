"""BEiT-B/16 with UperNet on ADE20K at 512, from self-supervised weights.

unilm/beit semantic_segmentation, upernet_beit_base_12_512_slide_160k_ade20k_pt.py.

    python main.py --config=configs/ade20k_base_512_pt.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    config = ade20k_base_512.get_config()
    config.run.init_from = "beit_base_patch16_224_pt22k.pth"
    config.optimizer.learning_rate = 7e-4
    config.optimizer.layer_decay = 0.65
    return config
