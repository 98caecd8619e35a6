"""BEiT v2-B/16 with UperNet on ADE20K at 512, from its self-supervised weights.

unilm/beit2 semantic_segmentation (the layers are those of BEiT). Published: mIoU 53.1, which others
repeated with 52.3 to 52.8; from weights fine-tuned on ImageNet-21k, layer decay 0.85, 53.5.

    python main.py --config=configs/ade20k_base_512_v2.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    config = ade20k_base_512.get_config()
    config.reference = "mIoU 53.1 (unilm/beit2 README)"
    config.run.init_from = "beitv2_base_patch16_224_pt1k.pth"
    config.model.drop_path_rate = 0.15
    config.optimizer.learning_rate = 5e-5
    config.optimizer.layer_decay = 0.75
    return config
