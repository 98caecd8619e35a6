"""Linear probe and k-NN of BEiT-L/16 on ImageNet-1k.

`probe_base` on `beit_large_patch16_224_pt22k`. Published (paper appendix D, with the changes named
in `probe_base`): 73.5 at block 14.

    python main.py --config=configs/probe_large.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import probe_base


def get_config() -> ConfigDict:
    """`probe_base` on other weights: the sizes are the checkpoint's."""
    config = probe_base.get_config()
    config.reference = "top-1 73.5 at block 14, 50 epochs, features mean (paper appendix D)"
    config.run.init_from = "beit_large_patch16_224_pt22k.pth"
    return config
