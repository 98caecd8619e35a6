"""BEiT-L/16 with UperNet on ADE20K at 512, from weights fine-tuned on ImageNet-22k.

unilm/beit semantic_segmentation, upernet_beit_large_24_512_slide_160k_ade20k_pt2ft.py.

    python main.py --config=configs/ade20k_large_512.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from beit_jax.config import ModelConfig
from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    return large(ade20k_base_512.get_config())


def large(config: ConfigDict) -> ConfigDict:
    """The config with the large model and what changes with it."""
    config.run.init_from = "beit_large_patch16_224_pt22k_ft22k.pth"
    config.model.update(ModelConfig.large().sizes)
    config.model.layer_scale_init = 1e-6
    config.model.drop_path_rate = 0.2
    config.head.blocks = (8, 12, 16, 24)  # out_indices=[7, 11, 15, 23], counted from 1
    config.head.channels = 1024
    config.optimizer.learning_rate = 2e-5
    config.optimizer.layer_decay = 0.95
    return config
