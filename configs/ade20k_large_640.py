"""BEiT-L/16 with UperNet on ADE20K at 640, from weights fine-tuned on ImageNet-22k.

unilm/beit semantic_segmentation, upernet_beit_large_24_640_slide_160k_ade20k_pt2ft.py: 8 × 1
images, 320,000 iterations, an update every two: 160,000 updates of 16 images, 1,500 of warm-up.
Published: mIoU 56.7; over several scales (ade20k_large_640_ms) 57.0. Repeated by others: 55.9.

    python main.py --config=configs/ade20k_large_640.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_640, ade20k_large_512


def get_config() -> ConfigDict:
    """`ade20k_base_640` with the large model."""
    config = ade20k_large_512.large(ade20k_base_640.get_config())
    config.reference = "mIoU 56.7 (unilm/beit README)"
    config.optimizer.accumulate = 2  # GradientCumulativeOptimizerHook; batch statistics of 8
    return config
