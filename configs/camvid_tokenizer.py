"""A small tokenizer trained on CamVid's 367 training images: the first of three commands.

    python main.py --config=configs/camvid_tokenizer.py --workdir=runs/camvid/tokenizer

CamVid's street scenes (480 × 360, as SegNet splits them) lie in `camvid/{train,val}`, each with
`images/` and `labels/`. `camvid_pretrain` and `camvid_segment` come next. Sizes are chosen for two
CPU cores.
"""

from ml_collections import ConfigDict

from configs import quickstart

SIZE = 128  # pixels of the encoder's view, 16 × 16 patches of 8; the tokenizer's is half of that
TRAINING = "folder:camvid/train/images"
HELD_OUT = "folder:camvid/val/images"


def get_config() -> ConfigDict:
    """The quickstart's tokenizer with 256 codes, on photographs."""
    config = quickstart.get_config().tokenizer
    config.run.steps = 600
    config.run.checkpoint_every = 200
    config.tokenizer.vocabulary = 256
    config.tokenizer.image_size = SIZE // 2
    config.data.source = TRAINING
    config.data.eval_source = HELD_OUT
    config.data.holdout = 0
    config.data.image_size = SIZE
    config.data.token_image_size = SIZE // 2
    config.data.augment.min_crop_scale = 0.1
    return config
