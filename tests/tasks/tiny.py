"""Config files for the tests: each job, as small as it can be and still be itself."""

from ml_collections import ConfigDict

from configs import beit_base, beit_base_ft1k, dvae, quickstart, quickstart_segment


def shrink_run(run: ConfigDict, *, steps: int) -> None:
    run.steps = steps
    run.batch_size = 8
    run.log_every = 1
    run.eval_every = 0
    run.eval_batches = 0
    run.picture_every = 0
    run.checkpoint_every = 0
    run.checkpoint_minutes = 0.0
    run.keep_checkpoints = 2


def shrink_model(model: ConfigDict) -> None:
    model.layers = 2
    model.width = 32
    model.heads = 2
    model.mlp_width = 64
    model.image_size = 32
    model.patch_size = 8
    model.scan_unroll = 1


def shrink_tokenizer(settings: ConfigDict, *, vocabulary: int) -> None:
    settings.vocabulary = vocabulary
    settings.image_size = 16
    settings.width = 8
    settings.levels = 2
    settings.codebook_width = 8


def shrink_data(data: ConfigDict) -> None:
    data.source = "embedded:64"
    data.eval_source = ""
    data.holdout = 12  # not a multiple of the batch
    data.workers = 2


def pretrain() -> ConfigDict:
    """Masked image modelling: 32 pixels, 4 × 4 patches, tokens of a random discrete VAE."""
    config = beit_base.get_config()
    shrink_run(config.run, steps=12)
    shrink_model(config.model)
    config.tokenizer.path = ""
    config.tokenizer.random_weights = True
    config.tokenizer.kind = "dvae"
    shrink_tokenizer(config.tokenizer, vocabulary=64)
    shrink_data(config.data)
    config.data.mask.count = 6
    config.data.mask.min_block = 2
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 3
    return config


def classify() -> ConfigDict:
    """Fine-tuning of `pretrain`'s model, with everything the recipe has."""
    config = beit_base_ft1k.get_config()
    shrink_run(config.run, steps=12)
    config.run.init_from = ""
    config.reference = ""
    shrink_model(config.model)
    config.classes = 0
    config.mixing.groups = 2
    shrink_data(config.data)
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 3
    return config


def segment() -> ConfigDict:
    """Segmentation with `pretrain`'s model and both heads, on crops of images that are larger."""
    config = quickstart_segment.get_config()
    shrink_run(config.run, steps=12)
    shrink_model(config.model)
    shrink_data(config.data)
    config.data.short_side = 48
    config.model.layers = 4
    config.head.channels = 16
    config.head.auxiliary_channels = 8
    config.inference.stride = 21
    config.inference.tile = 32
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 3
    return config


def tokenizer() -> ConfigDict:
    """A discrete VAE of 16 tokens on 16-pixel images."""
    config = dvae.get_config()
    shrink_run(config.run, steps=12)
    shrink_tokenizer(config.tokenizer, vocabulary=16)
    shrink_data(config.data)
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 3
    return config


def story() -> ConfigDict:
    """The quickstart, smaller."""
    config = quickstart.get_config()
    for job in (config.tokenizer, config.pretrain):
        shrink_run(job.run, steps=10)
        job.tokenizer.vocabulary = 16
        job.tokenizer.width = 8
        job.tokenizer.codebook_width = 8
        shrink_data(job.data)
        job.optimizer.warmup_steps = 3
    config.pretrain.online.every = 0
    config.pretrain.model.layers = 2
    config.pretrain.model.width = 32
    config.pretrain.model.heads = 2
    config.pretrain.model.mlp_width = 64
    for job in (config.probe, config.classify):
        shrink_run(job.run, steps=4)
        shrink_data(job.data)
    config.classify.optimizer.warmup_steps = 2
    for size in ("layers", "width", "heads", "mlp_width"):
        config.classify.model[size] = config.pretrain.model[size]
    return config


def get_config(name: str = "pretrain") -> ConfigDict:
    """For `main.py --config=tests/tasks/tiny.py:NAME`."""
    jobs = {
        "pretrain": pretrain,
        "tokenizer": tokenizer,
        "classify": classify,
        "segment": segment,
        "story": story,
    }
    return jobs[name]()
