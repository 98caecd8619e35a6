"""BEiT-L/16 fine-tuned on ImageNet-1k at 224, from weights pre-trained on 22k.

unilm/beit README, "Fine-tuning on ImageNet-1k" from `beit_large_patch16_224_pt22k`; 8 × 64 images,
two micro-batches. Published: top-1 86.0, top-5 97.6.

    python main.py --config=configs/beit_large_ft1k.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from beit_jax.config import ModelConfig
from configs import beit_base_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft1k` with a larger model, half the epochs and a gentler layer decay."""
    config = beit_base_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=1_281_167, batch=1024, epochs=50, warmup=5)
    config.reference = "top-1 86.0, top-5 97.6 (unilm/beit README)"
    config.run.init_from = "beit_large_patch16_224_pt22k.pth"
    large(config)
    config.model.drop_path_rate = 0.2  # --drop_path 0.2
    config.optimizer.learning_rate = 1e-3  # --lr 1e-3
    config.optimizer.layer_decay = 0.75  # --layer_decay 0.75
    config.mixing.groups = 16  # 8 GPUs, two micro-batches of 64 each
    return config


def large(config: ConfigDict) -> None:
    """The large encoder's sizes (paper §2.4)."""
    config.model.update(ModelConfig.large().sizes)
    config.model.layer_scale_init = 1e-5
