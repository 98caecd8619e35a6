"""BEiT-B/16 fine-tuned on ImageNet-1k at 384 after 22k labels.

unilm/beit README: the command of 224 with `--model beit_base_patch16_384 --input_size 384`; the
rest is implied. Published: top-1 86.8, top-5 98.1.

    python main.py --config=configs/beit_base_ft22k_ft1k_384.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft22k_ft1k


def get_config() -> ConfigDict:
    """`beit_base_ft22k_ft1k` at another resolution; positions are resized when loaded."""
    config = beit_base_ft22k_ft1k.get_config()
    config.reference = "top-1 86.8, top-5 98.1 (unilm/beit README)"
    config.model.image_size = 384
    return config
