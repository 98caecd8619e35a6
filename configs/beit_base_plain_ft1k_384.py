"""BEiT-B/16 on ImageNet-1k alone at 384: ten more epochs after the fine-tuning at 224.

Paper §3.1 and table 1, BEiT384-B. Published: top-1 84.6. The rate of these ten epochs is not
published; this takes the last stage's customary small one.

    python main.py --config=configs/beit_base_plain_ft1k_384.py --config.run.init_from=RUN_AT_224
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k, beit_base_plain_ft1k


def get_config() -> ConfigDict:
    """`beit_base_plain_ft1k`, continued at another resolution with all weights."""
    config = beit_base_plain_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=1_281_167, batch=1024, epochs=10, warmup=0)
    config.reference = "top-1 84.6 (paper table 1)"
    config.run.init_from = "runs/beit_base_plain_ft1k/best"
    config.run.init_allow_missing = ()
    config.run.init_allow_unused = ()
    config.model.image_size = 384
    config.optimizer.learning_rate = 2e-5  # not published; as the 22k recipes
    return config
