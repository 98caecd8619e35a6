"""BEiT-L/16 fine-tuned on ImageNet-22k labels, the intermediate step: `..._pt22k_ft22k`.

unilm/beit README, "Fine-tuning on ImageNet-22k": 16 × 64 images in two micro-batches, 90 epochs.

    python main.py --config=configs/beit_large_ft22k.py --config.data.source=folder:/data/22k
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k, beit_base_ft22k, beit_large_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft22k` with a larger model."""
    config = beit_base_ft22k.get_config()
    beit_base_ft1k.set_epochs(
        config, images=beit_base_ft22k.IMAGES, batch=2048, epochs=90, warmup=5
    )
    config.run.init_from = "beit_large_patch16_224_pt22k.pth"
    beit_large_ft1k.large(config)
    config.optimizer.learning_rate = 2e-3  # --lr 2e-3
    config.optimizer.layer_decay = 0.75  # --layer_decay 0.75
    return config
