"""BEiT-B/16 fine-tuned on ImageNet-1k at 224, from weights pre-trained on 22k.

unilm/beit README, "Fine-tuning on ImageNet-1k" from `beit_base_patch16_224_pt22k`; 8 × 128 images.
Published: top-1 83.7, top-5 96.6.

    python main.py --config=configs/beit_base_ft1k.py --config.run.init_from=WEIGHTS

WEIGHTS: a pre-training run of this project, a Hugging Face folder, a .pth of unilm or a
.safetensors of timm. For a run of beit_base, add --config.data.normalization=imagenet.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beit_jax.config import ModelConfig

BATCH = 1024
STEPS_PER_EPOCH = 1251  # 1,281,167 images // 1024


def get_config() -> ConfigDict:
    """The resolved settings; every key can be overridden on the command line."""
    config = ConfigDict()
    config.task = "classify"
    config.reference = "top-1 83.7, top-5 96.6 (unilm/beit README)"

    config.run = ConfigDict()
    config.run.steps = 100 * STEPS_PER_EPOCH  # --epochs 100
    config.run.batch_size = BATCH
    config.run.seed = 0
    config.run.fsdp = 1
    config.run.log_every = 50
    config.run.eval_every = STEPS_PER_EPOCH  # official: every epoch
    config.run.eval_batches = 0
    config.run.picture_every = 0
    config.run.checkpoint_every = 5 * STEPS_PER_EPOCH
    config.run.checkpoint_minutes = 10.0
    config.run.keep_checkpoints = 2
    config.run.init_from = "beit_base_patch16_224_pt22k.pth"
    config.run.init_allow_missing = ("fc_norm", "head")  # start fresh
    # The official loader drops these too, the norm included (run_class_finetuning.py:315-437).
    config.run.init_allow_unused = ("lm_head", "encoder/mask_token", "encoder/norm")
    config.run.init_allow_different = ()
    config.run.on_corrupt_checkpoint = "fall_back"
    config.run.print_sharding = False
    config.run.compilation_cache = "auto"
    config.run.wandb = ""  # a project at Weights & Biases

    config.model = ConfigDict(ModelConfig.base().sizes)
    config.model.image_size = 224
    config.model.patch_size = 16
    config.model.positions = "relative_per_block"  # run_class_finetuning.py:305
    config.model.layer_scale_init = 0.1
    config.model.drop_path_rate = 0.1  # --drop_path 0.1
    config.model.layer_norm_epsilon = 1e-6
    config.model.dtype = "auto"
    config.model.attention = "auto"
    config.model.residual_dtype = "float32"
    config.model.remat = "none"
    config.model.scan_unroll = 0

    config.classes = 1000
    config.labels = ()
    config.pooling = "mean"  # --use_mean_pooling, code default
    config.head_init_scale = 0.001  # --init_scale, code default
    config.label_smoothing = 0.1  # --smoothing, code default
    config.evaluate_only = False

    config.mixing = ConfigDict()
    config.mixing.mixup = 0.8  # --mixup 0.8
    config.mixing.cutmix = 1.0  # --cutmix 1.0
    config.mixing.probability = 1.0
    config.mixing.switch_probability = 0.5
    config.mixing.groups = 8  # one share for each GPU's images

    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"
    config.data.split = "train"
    config.data.eval_source = "tfds:imagenet2012"
    config.data.eval_split = "validation"
    config.data.holdout = 0
    config.data.image_size = config.model.get_ref("image_size")
    config.data.normalization = "half"  # as the 22k weights were pre-trained
    config.data.max_bad_share = 0.01
    config.data.max_pixels = 89_478_485  # of an image; larger ones count as bad
    config.data.exif_orientation = False
    config.data.workers = 0
    config.data.prefetch = 2
    config.data.service = ()
    config.data.repeats = 1  # official code; the paper's table 13 has repeated augmentation

    config.data.augment = ConfigDict()  # datasets.py:127-169
    config.data.augment.min_crop_scale = 0.08
    config.data.augment.max_crop_scale = 1.0
    config.data.augment.interpolation = "bicubic"  # --train_interpolation, code default
    config.data.augment.flip = True
    config.data.augment.operations = 2  # --aa rand-m9-mstd0.5-inc1, code default
    config.data.augment.magnitude = 9.0
    config.data.augment.magnitude_std = 0.5
    config.data.augment.operation_probability = 0.5
    config.data.augment.erase_probability = 0.25  # --reprob, code default
    config.data.augment.eval_crop = placeholder(float)  # None: 224/256 under 384 pixels, else 1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 4e-3  # --lr 4e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-6  # --min_lr, code default
    config.optimizer.warmup_steps = 20 * STEPS_PER_EPOCH  # --warmup_epochs 20
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.05  # --weight_decay 0.05
    config.optimizer.clip_norm = placeholder(float)  # None: no clipping
    config.optimizer.accumulate = 1
    config.optimizer.max_bad_steps = 10
    config.optimizer.layer_decay = 0.65  # --layer_decay 0.65
    config.optimizer.decay_relative_positions = True
    config.optimizer.decay_class_token = False
    config.optimizer.freeze_encoder = False
    config.optimizer.hold_steps = 1
    config.optimizer.ema_decay = placeholder(
        float
    )  # official default; its 0.9999 is never evaluated
    return config


def set_epochs(config: ConfigDict, *, images: int, batch: int, epochs: int, warmup: int) -> None:
    """Length, warm-up, evaluation and checkpoints in epochs of another data set or batch."""
    per_epoch = images // batch
    config.run.batch_size = batch
    config.run.steps = epochs * per_epoch
    config.run.eval_every = per_epoch
    config.run.checkpoint_every = per_epoch
    config.optimizer.warmup_steps = warmup * per_epoch
