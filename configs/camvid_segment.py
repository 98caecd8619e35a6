"""A small UperNet on CamVid: the last of three commands, from what `camvid_pretrain` learned.

    python main.py --config=configs/camvid_segment.py --workdir=runs/camvid/segment

With `--config.run.init_from=` it starts from scratch; `docs/segmentation.md` has figures of both.
"""

from ml_collections import ConfigDict

from configs import ade20k_base_512, camvid_tokenizer, quickstart_classify, quickstart_segment

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "cyclist"),
)


def get_config() -> ConfigDict:
    """`ade20k_base_512` at the size of `camvid_pretrain`: crops of 128 from images of 240 × 180."""
    config = quickstart_segment.small(ade20k_base_512.get_config())
    config.run.steps = 500
    config.run.batch_size = 8
    config.run.checkpoint_every = 250
    config.run.init_from = "runs/camvid/pretrain"
    quickstart_classify.small_model(config.model)
    config.model.image_size = camvid_tokenizer.SIZE
    config.labels = CLASSES
    config.data.source = "pairs:camvid/train"
    config.data.eval_source = "pairs:camvid/val"
    config.data.holdout = 0
    config.data.short_side = 180
    config.data.ignore_label = 11
    config.data.normalization = "half"  # as it was pre-trained
    config.inference.stride = 85
    config.optimizer.warmup_steps = 50
    return config
