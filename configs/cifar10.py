"""What pre-training is worth, measured on CIFAR-10: the quickstart's story on photographs.

32 × 32 images cut into 4 × 4 patches: 64 tokens, as in the quickstart; the tokenizer is trained on
them, with 256 codes. Sizes and lengths are chosen for two CPU cores. The images are in class
folders: one folder with `train/<class>/*.jpg` and `test/<class>/*.jpg`.

    python main.py --config=configs/cifar10.py
"""

from ml_collections import ConfigDict

from configs import quickstart

SIZE = 32
IMAGES = 10_000
BATCH = 64
STEPS_PER_EPOCH = IMAGES // BATCH
PROBE_BATCH = 256
PROBE_STEPS_PER_EPOCH = IMAGES // PROBE_BATCH


def get_config() -> ConfigDict:
    """A diff of `quickstart`; `tokenizer.data.source` and `eval_source` are those of all jobs."""
    config = quickstart.get_config()

    first = config.tokenizer
    first.run.steps = 1500
    first.run.log_every = 100
    first.run.eval_every = 500
    first.run.checkpoint_every = 500
    first.data.source = "folder:cifar10/train"
    first.data.eval_source = "folder:cifar10/test"
    first.data.holdout = 0
    first.data.image_size = SIZE
    first.data.token_image_size = SIZE
    first.tokenizer.image_size = SIZE
    first.tokenizer.vocabulary = 256

    second = config.pretrain
    second.run.steps = 20 * STEPS_PER_EPOCH
    second.run.batch_size = BATCH
    second.run.eval_every = 5 * STEPS_PER_EPOCH
    second.run.picture_every = 0
    second.run.checkpoint_every = 5 * STEPS_PER_EPOCH
    second.model.image_size = SIZE
    second.model.patch_size = 4
    second.tokenizer = first.tokenizer.copy_and_resolve_references()
    second.data = first.data.copy_and_resolve_references()
    second.data.source = first.data.get_ref("source")
    second.data.eval_source = first.data.get_ref("eval_source")
    second.data.mask = quickstart.get_config().pretrain.data.mask
    second.optimizer.learning_rate = 1.5e-3
    second.optimizer.warmup_steps = 2 * STEPS_PER_EPOCH

    probe = config.probe
    probe.run.steps = 50 * PROBE_STEPS_PER_EPOCH
    probe.run.batch_size = PROBE_BATCH
    probe.run.eval_every = 10 * PROBE_STEPS_PER_EPOCH
    probe.run.checkpoint_every = 0
    probe.features = "cls_mean"
    probe.linear = True
    probe.cached_views = 5
    probe.data.image_size = SIZE
    probe.data.source = first.data.get_ref("source")
    probe.data.eval_source = first.data.get_ref("eval_source")
    probe.data.holdout = 0
    probe.data.augment.min_crop_scale = 0.35
    probe.optimizer.hold_steps = PROBE_STEPS_PER_EPOCH

    last = config.classify
    last.run.steps = 6 * STEPS_PER_EPOCH
    last.run.batch_size = BATCH
    last.run.eval_every = 2 * STEPS_PER_EPOCH
    last.run.checkpoint_every = 2 * STEPS_PER_EPOCH
    last.model.image_size = SIZE
    last.model.patch_size = 4
    last.data.source = first.data.get_ref("source")
    last.data.eval_source = first.data.get_ref("eval_source")
    last.data.holdout = 0
    last.data.augment.min_crop_scale = 0.35
    last.optimizer.learning_rate = 1e-3
    last.optimizer.warmup_steps = STEPS_PER_EPOCH
    config.seeds = (0, 1, 2)
    return config
