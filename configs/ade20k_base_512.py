"""BEiT-B/16 with UperNet on ADE20K at 512, from weights fine-tuned on ImageNet-22k.

unilm/beit semantic_segmentation, upernet_beit_base_12_512_slide_160k_ade20k_pt2ft.py: 8 × 2 images,
160,000 iterations. No figure was published at 512; at 640 see ade20k_base_640.

    python main.py --config=configs/ade20k_base_512.py --config.run.init_from=WEIGHTS

WEIGHTS: anything that the library loads: a .pth of unilm, a Hugging Face folder, a run of this
project. The images are the Scene Parsing download, ADEChallengeData2016.zip, unpacked where the
command runs: 20,210 to train on, 2,000 to evaluate on.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beit_jax.config import ModelConfig
from configs.classes import ade20k

ADE = "ADEChallengeData2016"
STEPS = 160_000


def get_config() -> ConfigDict:
    """The resolved settings; every key can be overridden on the command line."""
    config = ConfigDict()
    config.task = "segment"
    config.reference = ""

    config.run = ConfigDict()
    config.run.steps = STEPS
    config.run.batch_size = 16  # 8 GPUs × samples_per_gpu 2
    config.run.seed = 0
    config.run.fsdp = 1
    config.run.log_every = 50
    config.run.eval_every = 16_000  # evaluation = dict(interval=16000)
    config.run.eval_batches = 0
    config.run.picture_every = 16_000
    config.run.checkpoint_every = 16_000
    config.run.checkpoint_minutes = 10.0
    config.run.keep_checkpoints = 2
    config.run.init_from = "beit_base_patch16_224_pt22k_ft22k.pth"
    config.run.init_allow_missing = ("neck", "head", "auxiliary")  # start fresh
    # The official loader drops these too (mmcv_custom/checkpoint.py).
    config.run.init_allow_unused = (
        "fc_norm",
        "head",
        "lm_head",
        "encoder/mask_token",
        "encoder/norm",
    )
    config.run.init_allow_different = ("normalization",)  # ImageNet's for all weights, see below
    config.run.on_corrupt_checkpoint = "fall_back"
    config.run.print_sharding = False
    config.run.compilation_cache = "auto"
    config.run.wandb = ""  # a project at Weights & Biases

    config.model = ConfigDict(ModelConfig.base().sizes)
    config.model.image_size = 512  # crop_size
    config.model.patch_size = 16
    config.model.positions = "relative_per_block"  # use_rel_pos_bias
    config.model.layer_scale_init = 0.1  # init_values
    config.model.drop_path_rate = 0.1
    config.model.layer_norm_epsilon = 1e-6
    config.model.dtype = "auto"  # official: float16 but for norms (apex O1)
    config.model.attention = "auto"
    config.model.residual_dtype = "float32"
    config.model.remat = "none"
    config.model.scan_unroll = 0

    config.head = ConfigDict()
    config.head.kind = "upernet"
    config.head.blocks = (4, 6, 8, 12)  # out_indices=[3, 5, 7, 11], counted from 1
    config.head.channels = 768
    config.head.pool_scales = (1, 2, 3, 6)
    config.head.dropout = 0.1
    config.head.auxiliary_channels = 256
    config.head.auxiliary_convs = 1
    config.head.auxiliary_concat = False
    config.head.auxiliary_weight = 0.4

    config.classes = 150
    config.labels = ade20k.CLASSES
    config.count_ignored = True  # mmseg 0.11's mean
    config.evaluate_only = False

    config.data = ConfigDict()
    config.data.source = f"pairs:{ADE}/images/training,{ADE}/annotations/training"
    config.data.split = "train"
    config.data.eval_source = f"pairs:{ADE}/images/validation,{ADE}/annotations/validation"
    config.data.eval_split = "validation"
    config.data.holdout = 0
    config.data.image_size = config.model.get_ref("image_size")
    config.data.short_side = 0  # the crop's side: img_scale=(2048, 512)
    config.data.long_side = 0  # four times that
    config.data.ignore_label = 255
    config.data.zero_is_background = True  # reduce_zero_label
    config.data.normalization = "imagenet"  # img_norm_cfg, whatever the weights were trained with
    config.data.max_bad_share = 0.01
    config.data.max_pixels = 89_478_485  # of an image; larger ones count as bad
    config.data.exif_orientation = True  # as cv2 reads
    config.data.workers = 0
    config.data.prefetch = 2
    config.data.service = ()

    config.data.augment = ConfigDict()  # train_pipeline
    config.data.augment.min_scale = 0.5
    config.data.augment.max_scale = 2.0
    config.data.augment.max_class_share = 0.75
    config.data.augment.flip = True
    config.data.augment.brightness = 32.0  # PhotoMetricDistortion's defaults
    config.data.augment.contrast = 0.5
    config.data.augment.saturation = 0.5
    config.data.augment.hue = 18

    config.inference = ConfigDict()
    config.inference.mode = "slide"
    config.inference.stride = 341
    config.inference.scales = (1.0,)
    config.inference.flip = False
    config.inference.fill_window = False
    config.inference.tile = 256

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-5
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.schedule = "poly"  # power 1: a line to zero
    config.optimizer.warmup_steps = 1500
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = placeholder(float)  # None: no clipping
    config.optimizer.accumulate = 1
    config.optimizer.max_bad_steps = 10
    config.optimizer.layer_decay = 0.9
    config.optimizer.decay_relative_positions = True
    config.optimizer.decay_class_token = True  # its name there begins with "backbone."
    config.optimizer.freeze_encoder = False
    config.optimizer.hold_steps = 1
    config.optimizer.ema_decay = placeholder(float)  # None: no moving average
    return config
