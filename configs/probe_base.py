"""Linear probe and k-NN of BEiT-B/16 on ImageNet-1k: every block in one run.

The official run_linear_eval.py on `beit_base_patch16_224_pt22k`: 8 × 128 images, 100 epochs, class
token and averaged patch tokens of each block; it reports the best block and epoch.

    python main.py --config=configs/probe_base.py --config.run.init_from=WEIGHTS

WEIGHTS: a run of this project, a Hugging Face folder, a .pth of unilm or a .safetensors of timm.

The paper's appendix D has half the epochs and the averaged patch tokens alone. Published: 56.7 at
block 9, from weights pre-trained on ImageNet-1k (whose pixels are normalised by "imagenet"):

    python main.py --config=configs/probe_base.py --config.run.init_from=WEIGHTS \\
        --config.features=mean --config.run.steps=62550 --config.data.normalization=imagenet

Much cheaper: `--config.cached_views=1` computes features once, 47 GB in the hosts' memory (half
of that with "mean"), and a probe then takes as long as one epoch and a bit;
`--config.linear=false` is k-NN alone.
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k

BATCH = 1024
STEPS_PER_EPOCH = 1251  # 1,281,167 images // 1024


def get_config() -> ConfigDict:
    """The resolved settings; every key can be overridden on the command line."""
    base = beit_base_ft1k.get_config()
    config = ConfigDict()
    config.task = "probe"
    config.reference = "top-1 56.7 at block 9, 50 epochs, features mean (paper appendix D)"

    config.run = base.run
    config.run.steps = 100 * STEPS_PER_EPOCH  # --epochs, code default; the paper's 50
    config.run.batch_size = BATCH
    config.run.eval_every = STEPS_PER_EPOCH
    config.run.checkpoint_every = 5 * STEPS_PER_EPOCH
    config.run.init_from = "beit_base_patch16_224_pt22k.pth"
    config.run.init_allow_missing = ()
    config.run.init_allow_unused = ()
    config.run.init_allow_different = ()

    config.classes = 1000
    config.features = "cls_mean"  # official code; the paper: "mean"
    config.blocks = ()  # all
    config.linear = True
    config.cached_views = 0

    config.neighbours = ConfigDict()
    config.neighbours.counts = (10, 20)
    config.neighbours.temperature = 0.07
    config.neighbours.blocks = ()  # all

    config.data = base.data
    config.data.image_size = 224
    config.data.normalization = "half"  # as the 22k weights were pre-trained
    config.data.repeats = 1
    config.data.augment.interpolation = "bilinear"  # torchvision's default for RandomResizedCrop
    config.data.augment.operations = 0  # crop and flip, nothing else
    config.data.augment.erase_probability = 0.0

    config.optimizer = base.optimizer
    config.optimizer.learning_rate = 4e-3  # --lr 4e-3, not scaled with the batch
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 1e-4  # of the biases too
    config.optimizer.hold_steps = STEPS_PER_EPOCH  # CosineAnnealingLR, stepped once an epoch
    config.optimizer.layer_decay = 1.0
    return config
