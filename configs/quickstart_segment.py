"""Segmentation in minutes on a laptop: the quickstart's model on the embedded images' maps.

Eleven classes: the background and ten shapes, which the model only begins to find in this time
(docs/segmentation.md has figures). From scratch as it is;
`--config.run.init_from=runs/quickstart/pretrain` starts from what the quickstart pre-trained.

    python main.py --config=configs/quickstart_segment.py
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512, quickstart_classify


def get_config() -> ConfigDict:
    """`ade20k_base_512` at the quickstart's size."""
    config = small(ade20k_base_512.get_config())
    config.run.steps = 800
    config.run.batch_size = 32
    config.run.init_from = ""
    quickstart_classify.small_model(config.model)
    config.data.source = "embedded:2000"
    config.data.eval_source = ""
    config.data.holdout = 200
    config.data.normalization = "half"
    config.data.augment.min_scale = 0.8
    config.data.augment.max_scale = 1.5
    config.inference.stride = 43
    config.inference.tile = 128  # all of an image
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    return config


def small(config: ConfigDict) -> ConfigDict:
    """The recipe with a head and steps that two CPU cores can train."""
    config.run.batch_size = 16
    config.run.log_every = 50
    config.run.eval_every = 0
    config.run.picture_every = 0
    config.run.checkpoint_every = 100
    config.run.init_allow_different = ()
    config.head.blocks = (1, 2, 3, 4)
    config.head.channels = 64
    config.head.auxiliary_channels = 32
    config.classes = 0
    config.labels = ()
    config.data.zero_is_background = False
    config.inference.tile = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.layer_decay = 1.0  # what starts from scratch must learn in every layer
    return config
