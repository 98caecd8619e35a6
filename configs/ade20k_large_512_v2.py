"""BEiT v2-L/16 with UperNet on ADE20K at 512, from its self-supervised weights.

unilm/beit2 semantic_segmentation (the layers are those of BEiT). Published: mIoU 56.7; from weights
fine-tuned on ImageNet-21k, with a learning rate of 3e-5, 57.54.

    python main.py --config=configs/ade20k_large_512_v2.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_large_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_large_512`."""
    config = ade20k_large_512.get_config()
    config.reference = "mIoU 56.7 (unilm/beit2 README)"
    config.run.init_from = "beitv2_large_patch16_224_pt1k.pth"
    config.optimizer.learning_rate = 4e-5
    config.optimizer.layer_decay = 0.9
    return config
