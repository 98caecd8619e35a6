"""BEiT-L/16 fine-tuned on ImageNet-1k at 224 after 22k labels: `..._large_..._pt22k_ft22kto1k`.

unilm/beit README, "Fine-tuning on ImageNet-1k" from `..._pt22k_ft22k`; 8 × 32 images in two
micro-batches, 30 epochs. Published: top-1 87.4, top-5 98.3.

    python main.py --config=configs/beit_large_ft22k_ft1k.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft22k_ft1k, beit_large_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft22k_ft1k` with a larger model and more drop path."""
    config = beit_base_ft22k_ft1k.get_config()
    config.reference = "top-1 87.4, top-5 98.3 (unilm/beit README)"
    config.run.init_from = "beit_large_patch16_224_pt22k_ft22k.pth"
    beit_large_ft1k.large(config)
    config.model.drop_path_rate = 0.4  # --drop_path 0.4
    config.optimizer.layer_decay = 0.9  # --layer_decay 0.9
    return config
