"""A discrete VAE as tokenizer, trained on ImageNet-1k.

Model: official `modeling_discrete_vae.py` as `utils.get_d_vae` builds it (112 pixels, 8192 tokens,
3 levels, codebook 512 wide, 256 channels; 20,081,411 parameters). The official repository has
neither weights nor a training script, so the recipe is DALL-E's (arXiv 2102.12092, appendix A.2) in
outline: temperature from 1 to 1/16, a weight on the divergence from uniform. In the paper
(appendix C) the authors' tokenizer has a reconstruction error of 0.0880 (mean |Δ| of normalised
RGB), DALL-E's 0.0856.

    python main.py --config=configs/dvae.py --config.data.source=folder:/data/photos
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

STEPS_PER_EPOCH = 2502  # 1,281,167 images // 512


def get_config() -> ConfigDict:
    """The resolved settings; every key can be overridden on the command line."""
    config = ConfigDict()
    config.task = "tokenizer"

    config.run = ConfigDict()
    config.run.steps = 60 * STEPS_PER_EPOCH  # 150,000, the length of DALL-E's anneal
    config.run.batch_size = 512  # DALL-E A.2
    config.run.seed = 0
    config.run.fsdp = 1
    config.run.log_every = 50
    config.run.eval_every = 5000
    config.run.eval_batches = 4
    config.run.picture_every = 10_000
    config.run.checkpoint_every = 5000
    config.run.checkpoint_minutes = 10.0
    config.run.keep_checkpoints = 3
    config.run.init_from = ""
    config.run.init_allow_missing = ()
    config.run.init_allow_unused = ()
    config.run.init_allow_different = ()
    config.run.on_corrupt_checkpoint = "fall_back"
    config.run.print_sharding = False
    config.run.compilation_cache = "auto"
    config.run.wandb = ""  # a project at Weights & Biases

    config.tokenizer = ConfigDict()
    config.tokenizer.kind = "dvae"
    config.tokenizer.vocabulary = 8192  # utils.py:540-557
    config.tokenizer.image_size = 112
    config.tokenizer.width = 256
    config.tokenizer.levels = 3
    config.tokenizer.codebook_width = 512
    config.tokenizer.dtype = "float32"  # it is trained here; a frozen one may be "auto"
    config.tokenizer.path = ""  # this job writes it
    config.tokenizer.random_weights = False
    config.tokenizer.sha256 = ""

    config.vae = ConfigDict()
    config.vae.temperature_start = 1.0  # DALL-E A.2; the official module's constant is 0.9
    config.vae.temperature_end = 1 / 16
    config.vae.temperature_steps = 0  # the whole run
    config.vae.kl_weight = 0.0  # modeling_discrete_vae.py:134
    config.vae.straight_through = False  # modeling_discrete_vae.py:135
    config.vae.reconstruction = "mse"

    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"
    config.data.split = "train"
    config.data.eval_source = "tfds:imagenet2012"
    config.data.eval_split = "validation"
    config.data.holdout = 0
    config.data.image_size = config.tokenizer.get_ref("image_size")  # view 1 is not used
    config.data.token_image_size = config.tokenizer.get_ref("image_size")
    config.data.normalization = "half"
    config.data.max_bad_share = 0.01
    config.data.max_pixels = 89_478_485  # of an image; larger ones count as bad
    config.data.exif_orientation = False
    config.data.workers = 0
    config.data.prefetch = 2
    config.data.service = ()
    config.data.augmentation_cycle = 0
    config.data.token_cache = ""

    config.data.augment = ConfigDict()  # pre-training's views, which will be tokenised
    config.data.augment.min_crop_scale = 0.08
    config.data.augment.max_crop_scale = 1.0
    config.data.augment.brightness = 0.4
    config.data.augment.contrast = 0.4
    config.data.augment.saturation = 0.4
    config.data.augment.flip = True
    config.data.augment.fidelity = "official"

    config.data.mask = ConfigDict()  # of a pre-training run; this job reads no masks
    config.data.mask.kind = "random"
    config.data.mask.count = 1
    config.data.mask.ratio = 0.4
    config.data.mask.min_block = 1
    config.data.mask.max_block = placeholder(int)
    config.data.mask.min_aspect = 0.3

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4  # DALL-E A.2
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1.25e-6  # DALL-E A.2
    config.optimizer.warmup_steps = 1000
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 1e-4  # DALL-E A.2
    config.optimizer.clip_norm = placeholder(float)  # None: no clipping
    config.optimizer.accumulate = 1
    config.optimizer.max_bad_steps = 10
    config.optimizer.layer_decay = 1.0
    config.optimizer.decay_relative_positions = True
    config.optimizer.decay_class_token = False
    config.optimizer.freeze_encoder = False
    config.optimizer.hold_steps = 1
    config.optimizer.ema_decay = placeholder(float)  # None: no moving average
    return config
