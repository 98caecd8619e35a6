"""Eight minutes on a laptop: a small tokenizer, a small BEiT, fine-tuning, on images made by code.

No download. Sizes are chosen so that two CPU cores learn something visible in a few minutes;
only the method is the paper's: 64 × 64 images cut into 8 × 8 patches, one token of 128 for each.

    python main.py --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from configs import beit_base, dvae, probe_base, quickstart_classify

SIZE = quickstart_classify.SIZE  # pixels of the encoder's view; the tokenizer's is half of that


def get_config() -> ConfigDict:
    """Jobs as diffs of `dvae`, `beit_base`, `probe_base` and `beit_base_ft1k`."""
    config = ConfigDict()
    config.task = "quickstart"

    first = config.tokenizer = dvae.get_config()
    first.run.steps = 500
    first.run.batch_size = 32
    first.run.log_every = 50
    first.run.eval_every = 0
    first.run.eval_batches = 0
    first.run.picture_every = 0
    first.run.checkpoint_every = 250
    first.run.keep_checkpoints = 2
    first.tokenizer.vocabulary = 128
    first.tokenizer.image_size = SIZE // 2
    first.tokenizer.levels = 2
    first.tokenizer.width = 32
    first.tokenizer.codebook_width = 64
    first.vae.kl_weight = 0.003
    first.vae.temperature_start = 0.5
    first.data = first.data.copy_and_resolve_references()  # its two views differ in size
    first.data.source = "embedded"
    first.data.eval_source = ""
    first.data.holdout = 512
    first.data.image_size = SIZE
    first.data.token_image_size = SIZE // 2
    first.data.augment.min_crop_scale = 0.5
    first.optimizer.learning_rate = 1e-2
    first.optimizer.warmup_steps = 50
    first.optimizer.weight_decay = 0.0

    second = config.pretrain = beit_base.get_config()
    second.run.steps = 600
    second.run.batch_size = 64
    second.run.log_every = 50
    second.run.eval_every = 200
    second.run.eval_batches = 0
    second.run.picture_every = 200
    second.run.checkpoint_every = 200
    second.run.keep_checkpoints = 2
    quickstart_classify.small_model(second.model)
    second.tokenizer = first.tokenizer.copy_and_resolve_references()
    second.data = first.data.copy_and_resolve_references()
    second.data.mask.kind = "block"
    second.data.mask.count = 24  # 38 % of 64, as 75 of 196; the smallest block shrinks with it
    second.data.mask.min_block = 4
    second.optimizer.learning_rate = 2e-3
    second.optimizer.warmup_steps = 100

    second.online.every = 200  # 1.3 % of the time of these steps: bench/online.py
    second.online.bank = 500
    second.online.queries = 200

    config.probe = probe_base.get_config()
    small_probe(config.probe)
    config.classify = quickstart_classify.get_config()
    config.seeds = (0,)
    return config


def small_probe(config: ConfigDict) -> None:
    """k-NN alone, among the labelled images that fine-tuning gets."""
    labelled = quickstart_classify.get_config()
    config.reference = ""
    config.run.batch_size = labelled.run.batch_size
    config.run.init_from = "pretrain"  # filled in: before and after pre-training
    config.features = "mean"
    config.classes = 0
    config.linear = False
    config.data = labelled.data.copy_and_resolve_references()
    config.data.image_size = SIZE
    config.optimizer.warmup_steps = 0
