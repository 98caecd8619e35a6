"""BEiT-B/16 fine-tuned on CIFAR-100 at 224: the paper's table 11.

Paper table 13: 150 epochs, batch 512, repeated augmentation, no erasing. Published: 90.1, from
weights pre-trained on ImageNet-1k.

    tfds build cifar100 --file_format=array_record
    python main.py --config=configs/beit_base_cifar100.py --config.run.init_from=WEIGHTS
"""

from ml_collections import ConfigDict

from configs import beit_base_ft1k, beit_base_plain_ft1k


def get_config() -> ConfigDict:
    """`beit_base_plain_ft1k` on small images, enlarged, with more weight decay."""
    config = beit_base_plain_ft1k.get_config()
    beit_base_ft1k.set_epochs(config, images=50_000, batch=512, epochs=150, warmup=20)
    config.reference = "top-1 90.1 (paper table 11)"
    config.classes = 100
    config.data.source = "tfds:cifar100"
    config.data.eval_source = "tfds:cifar100"
    config.data.eval_split = "test"
    config.data.augment.erase_probability = 0.0
    config.optimizer.weight_decay = 0.3
    return config
