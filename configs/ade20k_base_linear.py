"""A linear layer on frozen features on ADE20K at 512: the probe that DINOv2 and others report.

BatchNorm and one linear layer on the last block's outputs, 40,000 steps of 16 images, AdamW with a
weight decay of 1e-4: DINOv2's published config. There is no such figure for BEiT.

    python main.py --config=configs/ade20k_base_linear.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512


def get_config() -> ConfigDict:
    """A diff of `ade20k_base_512`."""
    config = ade20k_base_512.get_config()
    config.run.steps = 40_000
    config.run.eval_every = 0
    config.model.drop_path_rate = 0.0
    config.head.kind = "linear"
    config.head.blocks = (12,)
    config.head.channels = 0
    config.head.dropout = 0.0
    config.head.auxiliary_channels = 0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.layer_decay = 1.0
    config.optimizer.freeze_encoder = True
    return config
