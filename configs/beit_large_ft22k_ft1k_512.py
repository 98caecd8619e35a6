"""BEiT-L/16 fine-tuned on ImageNet-1k at 512 after 22k labels.

The README publishes the weights (top-1 88.60, top-5 98.66) but no command. A user found the
settings of 224 poor at 512 (unilm issue 370), and the authors' answer is not public: take this as a
starting point.

    python main.py --config=configs/beit_large_ft22k_ft1k_512.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_large_ft22k_ft1k


def get_config() -> ConfigDict:
    """`beit_large_ft22k_ft1k` at another resolution; positions are resized when loaded."""
    config = beit_large_ft22k_ft1k.get_config()
    config.reference = "top-1 88.60, top-5 98.66 (unilm/beit README; recipe not published)"
    config.model.image_size = 512
    return config
