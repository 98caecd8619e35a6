"""BEiT-B/16 fine-tuned on ImageNet-1k at 224 after 22k labels: `..._base_..._pt22k_ft22kto1k`.

unilm/beit README, "Fine-tuning on ImageNet-1k" from `..._pt22k_ft22k`; 8 × 64 images, 30 epochs.
Published: top-1 85.2, top-5 97.6.

    python main.py --config=configs/beit_base_ft22k_ft1k.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft1k` with a small rate, no decay to speak of, no mixing."""
    config = beit_base_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=1_281_167, batch=512, epochs=30, warmup=5)
    config.reference = "top-1 85.2, top-5 97.6 (unilm/beit README)"
    config.run.init_from = "beit_base_patch16_224_pt22k_ft22k.pth"
    config.run.init_allow_missing = ("head",)  # 21,841 classes there; fc_norm is inherited
    config.run.init_allow_unused = ("head",)
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0
    config.mixing.groups = 1
    config.optimizer.learning_rate = 2e-5  # --lr 2e-5
    config.optimizer.weight_decay = 1e-8  # --weight_decay 1e-8: the official way to say 0
    config.optimizer.layer_decay = 0.85  # --layer_decay 0.85
    return config
