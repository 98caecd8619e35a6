"""BEiT-L/16 pre-trained and fine-tuned on ImageNet-1k alone: the paper's table 1.

Paper table 13: 50 epochs, no repeated augmentation. Published: top-1 85.2.

    python main.py --config=configs/beit_large_plain_ft1k.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k, beit_base_plain_ft1k, beit_large_ft1k


def get_config() -> ConfigDict:
    """`beit_base_plain_ft1k` with a larger model, half the epochs and a gentler layer decay."""
    config = beit_base_plain_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=1_281_167, batch=1024, epochs=50, warmup=5)
    config.reference = "top-1 85.2 (paper table 1)"
    config.run.init_from = "runs/beit_large_plain"
    beit_large_ft1k.large(config)
    config.model.layer_scale_init = None
    config.data.repeats = 1
    config.optimizer.learning_rate = 2e-3  # of table 13's {2, 3, 4, 5}e-3
    config.optimizer.layer_decay = 0.75
    return config
