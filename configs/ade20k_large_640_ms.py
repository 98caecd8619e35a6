"""Evaluates a large segmenter over six scales and mirrored, as the official `_ms` configs do.

upernet_beit_large_24_640_slide_160k_ade20k_pt2ft_ms.py. Published: mIoU 57.0.

    python main.py --config=configs/ade20k_large_640_ms.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_640_ms, ade20k_large_640


def get_config() -> ConfigDict:
    """A diff of `ade20k_large_640`."""
    config = ade20k_large_640.get_config()
    config = ade20k_base_640_ms.several_scales(config, weights="beit_large_640_ade20k.pth")
    config.reference = "mIoU 57.0 (unilm/beit README)"
    return config
