"""BEiT-B/16 fine-tuned on ImageNet-22k labels, the intermediate step: `..._pt22k_ft22k`.

unilm/beit README, "Fine-tuning on ImageNet-22k": 16 × 256 images, 90 epochs. Its --clip_grad 3.0
has no effect with DeepSpeed, so there is no clipping here. TFDS has no ImageNet-22k: a folder of
21,841 class folders.

    python main.py --config=configs/beit_base_ft22k.py --config.data.source=folder:/data/22k
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k

IMAGES = 14_197_122


def get_config() -> ConfigDict:
    """`beit_base_ft1k` on 21,841 classes, without mixing."""
    config = beit_base_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=IMAGES, batch=4096, epochs=90, warmup=5)
    config.reference = ""
    config.classes = 21_841
    config.data.source = "folder:imagenet22k"
    config.data.eval_source = ""
    config.data.holdout = 50_000  # not official: the authors hold out no 22k images
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0
    config.mixing.groups = 1
    config.model.drop_path_rate = 0.2  # --drop_path 0.2
    config.optimizer.learning_rate = 3e-3  # --lr 3e-3
    return config
