"""BEiT-B/16 on ImageNet-1k, 800 epochs: the official README's pre-training command (BEiT+).

arXiv 2106.08254; unilm/beit README, "Pre-training on ImageNet-1k"; run_beit_pretraining.py.

    python main.py --config=configs/beit_base.py --config.tokenizer.path=dalle.safetensors

About 5 days on 16 V100 in the paper. Published: 83.2 % top-1 after fine-tuning at 224 (table 1,
plain ViT); the only published pre-training figures are for 300 epochs, see beit_base_300ep.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beit_jax.config import ModelConfig

STEPS_PER_EPOCH = 625  # 1,281,167 images // 2048, last incomplete batch dropped


def get_config() -> ConfigDict:
    """The resolved settings; every key can be overridden on the command line."""
    config = ConfigDict()
    config.task = "pretrain"
    config.reference = ""
    config.evaluate_only = False

    config.run = ConfigDict()
    config.run.steps = 800 * STEPS_PER_EPOCH  # paper §2.5: 500k steps
    config.run.batch_size = 2048  # paper table 12
    config.run.seed = 0
    config.run.fsdp = 1  # parameters and Adam's moments are 1.1 GB: no need to shard them
    config.run.log_every = 50
    config.run.eval_every = 5 * STEPS_PER_EPOCH
    config.run.eval_batches = 4
    config.run.picture_every = 20 * STEPS_PER_EPOCH
    config.run.checkpoint_every = 5 * STEPS_PER_EPOCH  # official: every 20 epochs
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

    config.model = ConfigDict(ModelConfig.base().sizes)  # 12 layers of 768: paper §2.4
    config.model.image_size = 224
    config.model.patch_size = 16
    config.model.positions = "relative_shared"  # modeling_pretrain.py, code default
    config.model.layer_scale_init = 0.1  # --layer_scale_init_value, code default
    config.model.drop_path_rate = 0.1  # paper table 12: "stochastic depth"
    config.model.layer_norm_epsilon = 1e-6  # modeling_pretrain.py:35
    config.model.dtype = "auto"
    config.model.attention = "auto"
    config.model.residual_dtype = "float32"  # under autocast float32 gammas promote the stream
    config.model.remat = "none"
    config.model.scan_unroll = 0  # all blocks: 25 % faster on TPU than a rolled scan

    config.tokenizer = ConfigDict()
    config.tokenizer.kind = "dalle"  # §2.2 of the paper: the DALL-E dVAE, 8192 tokens
    config.tokenizer.path = "dalle.safetensors"
    config.tokenizer.random_weights = False
    config.tokenizer.vocabulary = 8192
    config.tokenizer.image_size = 112  # --second_input_size, code default
    config.tokenizer.width = 256  # dall_e/encoder.py: n_hid
    config.tokenizer.levels = 3  # of kind "dvae" only, as the next
    config.tokenizer.codebook_width = 512
    config.tokenizer.dtype = "auto"  # official: float16 but for the last convolution
    config.tokenizer.sha256 = ""

    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"
    config.data.split = "train"
    config.data.eval_source = "tfds:imagenet2012"
    config.data.eval_split = "validation"
    config.data.holdout = 0
    config.data.image_size = config.model.get_ref("image_size")
    config.data.token_image_size = config.tokenizer.get_ref("image_size")
    config.data.normalization = "imagenet"  # README: --imagenet_default_mean_and_std on IN-1k
    config.data.max_bad_share = 0.01
    config.data.max_pixels = 89_478_485  # of an image; larger ones count as bad
    config.data.exif_orientation = False  # as the official loader
    config.data.workers = 0
    config.data.prefetch = 2
    config.data.service = ()
    config.data.augmentation_cycle = 0
    config.data.token_cache = ""

    config.data.augment = ConfigDict()
    config.data.augment.min_crop_scale = 0.08  # transforms.py:67-166, torchvision's default
    config.data.augment.max_crop_scale = 1.0
    config.data.augment.brightness = 0.4  # datasets.py:33: ColorJitter(0.4, 0.4, 0.4)
    config.data.augment.contrast = 0.4
    config.data.augment.saturation = 0.4
    config.data.augment.flip = True
    config.data.augment.fidelity = "official"  # or "fast": half the host's work, views 2 levels off

    config.data.mask = ConfigDict()
    config.data.mask.kind = "block"  # masking_generator.py; "block_paper" for algorithm 1
    config.data.mask.count = 75  # --num_mask_patches 75, README
    config.data.mask.ratio = 0.4  # of kind "block_paper" only
    config.data.mask.max_block = placeholder(int)  # None: code default
    config.data.mask.min_block = 16  # --min_mask_patches_per_block, code default
    config.data.mask.min_aspect = 0.3  # masking_generator.py:29

    config.online = ConfigDict()  # k-NN accuracy and health of the features between steps
    config.online.every = 0  # steps; 0: never
    config.online.source = ""  # labelled images; "": the run's own
    config.online.split = "train"
    config.online.eval_source = ""
    config.online.eval_split = "validation"
    config.online.holdout = 0
    config.online.bank = 10_000
    config.online.queries = 2_000
    config.online.neighbours = 10
    config.online.block = 0  # at three quarters of the depth
    config.online.eval_crop = placeholder(float)  # None: as for classification

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1.5e-3  # paper table 12; absolute, not scaled
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-5  # paper table 12
    config.optimizer.warmup_steps = 10 * STEPS_PER_EPOCH  # paper table 12: 10 epochs
    config.optimizer.beta1 = 0.9  # paper table 12
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.05  # paper table 12
    config.optimizer.clip_norm = 3.0  # paper table 12, base
    config.optimizer.accumulate = 1
    config.optimizer.max_bad_steps = 10
    config.optimizer.layer_decay = 1.0
    config.optimizer.decay_relative_positions = True
    config.optimizer.decay_class_token = False
    config.optimizer.freeze_encoder = False
    config.optimizer.hold_steps = 1
    config.optimizer.ema_decay = placeholder(float)  # None: no moving average
    return config
