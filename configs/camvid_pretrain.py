"""A small BEiT pre-trained on CamVid's 367 training images, without their labels.

    python main.py --config=configs/camvid_pretrain.py --workdir=runs/camvid/pretrain

The tokenizer is that of `camvid_tokenizer`, and `camvid_segment` starts from the result.
"""

from ml_collections import ConfigDict

from configs import camvid_tokenizer, quickstart

TOKENIZER = "runs/camvid/tokenizer/tokenizer.safetensors"


def get_config() -> ConfigDict:
    """The quickstart's pre-training at 128 pixels: 256 patches, 97 of them masked."""
    config = quickstart.get_config().pretrain
    first = camvid_tokenizer.get_config()
    config.run.steps = 1200
    config.run.batch_size = 32
    config.run.eval_every = 300
    config.online.every = 300  # no k-NN, since the images have no classes
    config.run.picture_every = 0
    config.run.checkpoint_every = 300
    config.model.image_size = camvid_tokenizer.SIZE
    config.tokenizer = first.tokenizer.copy_and_resolve_references()
    config.tokenizer.path = TOKENIZER
    config.data = first.data.copy_and_resolve_references()
    config.data.mask = quickstart.get_config().pretrain.data.mask
    config.data.mask.count = 97  # 38 % of 256, as 75 of 196
    config.data.mask.min_block = 16
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 100
    return config
