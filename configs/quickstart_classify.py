"""Classification in a minute on a laptop: the quickstart's model on the embedded images.

From scratch as it is; `--config.run.init_from=runs/quickstart/pretrain` starts from what the
quickstart pre-trained.

    python main.py --config=configs/quickstart_classify.py
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k

SIZE = 64  # pixels


def get_config() -> ConfigDict:
    """`beit_base_ft1k` at the quickstart's size."""
    return small(beit_base_ft1k.get_config())


def small(config: ConfigDict) -> ConfigDict:
    """The same task on 2,000 of the embedded images, with the quickstart's model."""
    config.reference = ""
    config.run.steps = 150
    config.run.batch_size = 64
    config.run.eval_every = 0
    config.run.checkpoint_every = 100
    config.run.init_from = ""
    small_model(config.model)
    config.classes = 0
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0
    config.mixing.groups = 1
    config.data.source = "embedded:2000"
    config.data.eval_source = ""
    config.data.holdout = 1000
    config.data.augment.min_crop_scale = 0.5
    config.data.augment.operations = 0
    config.data.augment.erase_probability = 0.0
    config.data.augment.eval_crop = 1.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.layer_decay = 1.0  # what starts from scratch must learn in every layer
    return config


def small_model(model: ConfigDict) -> None:
    """The quickstart's encoder: 0.8 M parameters, 64 patches."""
    model.layers = 4
    model.width = 128
    model.heads = 4
    model.mlp_width = 512
    model.image_size = SIZE
    model.patch_size = 8
    model.drop_path_rate = 0.0
    model.scan_unroll = 1
