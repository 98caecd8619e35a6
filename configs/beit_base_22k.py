"""BEiT-B/16 on ImageNet-22k, 150 epochs: the released `beit_base_patch16_224_pt22k`.

unilm/beit README, "Pre-training on ImageNet-22k". TFDS has no ImageNet-22k: point at a folder.

    python main.py --config=configs/beit_base_22k.py --config.data.source=folder:/data/imagenet22k
"""

from ml_collections import ConfigDict

from configs import beit_base

STEPS_PER_EPOCH = 6932  # 14,197,122 images // 2048


def get_config() -> ConfigDict:
    """`beit_base` with the larger data set's schedule and pixel statistics."""
    config = beit_base.get_config()
    config.run.steps = 150 * STEPS_PER_EPOCH
    config.data.source = "folder:imagenet22k"
    config.data.eval_source = ""
    config.data.holdout = 8192  # withheld from training, for the held-out loss
    config.data.normalization = "half"  # README: 0.5 / 0.5 without the ImageNet flag
    config.optimizer.warmup_steps = 10_000  # --warmup_steps 10000
    return config
