"""BEiT-B/16 with UperNet on ADE20K at 640, from weights fine-tuned on ImageNet-22k.

unilm/beit semantic_segmentation, upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py. Published:
mIoU 53.6; over several scales (ade20k_base_640_ms) 54.2. Others who repeated it got 53.0 to 53.3.

    python main.py --config=configs/ade20k_base_640.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    config = ade20k_base_512.get_config()
    config.reference = "mIoU 53.61, mAcc 64.82, aAcc 84.62 (unilm/beit README)"
    config.model.image_size = 640
    config.inference.stride = 426
    return config
