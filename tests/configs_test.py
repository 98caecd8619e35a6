"""Every recipe parses, and its model has exactly the published number of parameters."""

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.models.segmenter import segmenter
from beit_jax.tokenizers.dvae import discrete_vae

# Official log (base: 91,965,776) and the sizes of the released checkpoints; of a plain ViT at
# another resolution or with other classes, what those change. A probe has the checkpoint's model.
PARAMETERS = {
    "beit_base": 91_965_776,
    "beit_base_300ep": 91_965_776,
    "beit_base_22k": 91_965_776,
    "beit_base_plain": 92_089_856,
    "beit_large": 311_534_016,
    "beit_large_22k": 311_534_016,
    "beit_large_plain": 311_674_880,
    "dvae": 20_081_411,
    "quickstart": 836_240,
    "cifar10": 834_320,
    "beit_base_ft22k": 102_557_713,
    "beit_large_ft22k": 325_792_593,
    "beit_base_ft1k": 86_530_984,
    "beit_large_ft1k": 304_430_568,
    "beit_base_ft22k_ft1k": 86_530_984,
    "beit_base_ft22k_ft1k_384": 86_744_104,
    "beit_large_ft22k_ft1k": 304_430_568,
    "beit_large_ft22k_ft1k_384": 304_998_888,
    "beit_large_ft22k_ft1k_512": 305_674_728,
    "beit_base_plain_ft1k": 86_558_440,
    "beit_base_plain_ft1k_384": 86_558_440 + (577 - 197) * 768,
    "beit_large_plain_ft1k": 304_302_056,
    "beit_base_cifar100": 86_558_440 - 900 * 769,
    "quickstart_classify": 823_626,
    # With neck and both heads: B-640 and L-640 are the sizes of the released checkpoints.
    "ade20k_base_512": 163_080_812,
    "ade20k_base_512_pt": 163_080_812,
    "ade20k_base_512_v2": 163_080_812,
    "ade20k_base_640": 163_407_980,
    "ade20k_base_640_ms": 163_407_980,
    "ade20k_large_512": 440_398_636,
    "ade20k_large_512_v2": 440_398_636,
    "ade20k_large_640": 441_271_084,
    "ade20k_large_640_ms": 441_271_084,
    "ade20k_base_setr_pup": 90_004_886,
    "ade20k_base_linear": 86_343_894,
    "quickstart_segment": 1_463_862,
    "camvid_tokenizer": 170_339,
    "camvid_pretrain": 855_696,
    "camvid_segment": 1_475_638,
    "probe_base": None,
    "probe_large": None,
}
CONFIGS = Path(__file__).parent.parent / "configs"


def load(name):
    return jobs.parse_job(importlib.import_module(f"configs.{name}").get_config().to_dict())


def count(shapes):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_every_recipe_is_in_the_table():
    names = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert names == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_number_of_parameters(name):
    config = load(name)
    if config.task == "tokenizer":
        assert count(discrete_vae(config.tokenizer).shapes()) == PARAMETERS[name]
        return
    if config.task == "classify":
        classes = config.classes or 10
        model = classifier(config.model, classes=classes, pooling=config.pooling)
        assert count(model.shapes()) == PARAMETERS[name]
        return
    if config.task == "segment":
        classes = config.classes or len(config.labels) or 11
        model = segmenter(config.model, head=config.head, classes=classes)
        assert count(model.shapes()) == PARAMETERS[name]
        return
    if config.task == "probe":  # its model is the checkpoint's
        assert PARAMETERS[name] is None
        return
    config = config.pretrain if config.task == "quickstart" else config
    model = masked_image_model(config.model, vocabulary=config.tokenizer.vocabulary)
    assert count(model.shapes()) == PARAMETERS[name]


def test_every_setting_can_be_overridden_on_the_command_line():
    """`--config.a.b=c` works only for keys that the file has, so each file has all of them."""

    def missing(settings, section, path):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in section:
                yield f"{path}.{field.name}"
            elif dataclasses.is_dataclass(value):
                yield from missing(value, section[field.name], f"{path}.{field.name}")

    names = ("beit_base", "dvae", "quickstart", "beit_base_ft1k", "probe_base", "ade20k_base_512")
    for name in names:
        section = importlib.import_module(f"configs.{name}").get_config().to_dict()
        assert not list(missing(load(name), section, name))


def test_an_encoder_alone_has_the_published_number_of_parameters():
    """Without a mask token and a head, as fine-tuning starts from it."""
    for name, encoder in (("beit_base", 85_665_360), ("beit_large", 303_136_192)):
        shapes = masked_image_model(load(name).model, vocabulary=8192).shapes()["encoder"]
        assert count({k: v for k, v in shapes.items() if k != "mask_token"}) == encoder


def test_pre_training_recipes_have_the_published_settings():
    """Paper table 12, and the official README's commands where they differ from it."""
    base, large = load("beit_base"), load("beit_large")
    assert base.run.steps == large.run.steps == 500_000
    assert base.optimizer.warmup_steps == 6250
    assert (base.optimizer.clip_norm, large.optimizer.clip_norm) == (3.0, 1.0)
    assert (base.model.layer_scale_init, large.model.layer_scale_init) == (0.1, 1e-5)
    assert base.data.normalization == "imagenet"
    more = load("beit_large_22k")
    assert (more.run.steps, more.optimizer.warmup_steps) == (150 * 6932, 10_000)
    assert more.data.normalization == "half"
    assert more.model == large.model
    plain = load("beit_base_plain").model
    assert (plain.positions, plain.layer_scale_init) == ("absolute", None)


# spec: unilm/beit README and get_started_for_image_classification.md; paper table 13. Epochs and
# warm-up in epochs of the data set.
FINE_TUNING = {
    # name: batch, rate, epochs, warm-up, layer decay, drop path, weight decay, mixup, cutmix
    "beit_base_ft22k": (4096, 3e-3, 90, 5, 0.65, 0.2, 0.05, 0.0, 0.0),
    "beit_large_ft22k": (2048, 2e-3, 90, 5, 0.75, 0.2, 0.05, 0.0, 0.0),
    "beit_base_ft1k": (1024, 4e-3, 100, 20, 0.65, 0.1, 0.05, 0.8, 1.0),
    "beit_large_ft1k": (1024, 1e-3, 50, 5, 0.75, 0.2, 0.05, 0.8, 1.0),
    "beit_base_ft22k_ft1k": (512, 2e-5, 30, 5, 0.85, 0.1, 1e-8, 0.0, 0.0),
    "beit_base_ft22k_ft1k_384": (512, 2e-5, 30, 5, 0.85, 0.1, 1e-8, 0.0, 0.0),
    "beit_large_ft22k_ft1k": (512, 2e-5, 30, 5, 0.9, 0.4, 1e-8, 0.0, 0.0),
    "beit_large_ft22k_ft1k_384": (512, 2e-5, 30, 5, 0.9, 0.4, 1e-8, 0.0, 0.0),
    "beit_large_ft22k_ft1k_512": (512, 2e-5, 30, 5, 0.9, 0.4, 1e-8, 0.0, 0.0),
    "beit_base_plain_ft1k": (1024, 4e-3, 100, 20, 0.65, 0.1, 0.05, 0.8, 1.0),
    "beit_large_plain_ft1k": (1024, 2e-3, 50, 5, 0.75, 0.1, 0.05, 0.8, 1.0),
    "beit_base_cifar100": (512, 4e-3, 150, 20, 0.65, 0.1, 0.3, 0.8, 1.0),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_recipes_have_the_published_settings(name):
    config = load(name)
    images = {21_841: 14_197_122, 1000: 1_281_167, 100: 50_000}[config.classes]
    epoch = images // config.run.batch_size
    assert (
        config.run.batch_size,
        config.optimizer.learning_rate,
        config.run.steps / epoch,
        config.optimizer.warmup_steps / epoch,
        config.optimizer.layer_decay,
        config.model.drop_path_rate,
        config.optimizer.weight_decay,
        config.mixing.mixup,
        config.mixing.cutmix,
    ) == FINE_TUNING[name]
    assert config.optimizer.clip_norm is None  # --clip_grad has no effect with DeepSpeed
    assert config.optimizer.min_learning_rate == 1e-6
    assert (config.label_smoothing, config.head_init_scale, config.pooling) == (0.1, 0.001, "mean")
    augment = config.data.augment
    assert (augment.operations, augment.magnitude, augment.magnitude_std) == (2, 9.0, 0.5)
    assert augment.erase_probability == (0.0 if name == "beit_base_cifar100" else 0.25)
    # Paper table 13: repeated augmentation for base, in the paper's own recipe alone.
    assert config.data.repeats == (3 if name.startswith(("beit_base_plain", "beit_base_c")) else 1)
    assert config.data.image_size == config.model.image_size
    plain = config.model.positions == "absolute"
    assert plain == ("plain" in name or "cifar100" in name)
    assert (config.model.layer_scale_init is None) == plain


# beit/semantic_segmentation/configs; beit2's; paper table 14. By name: rate, layer decay, drop path
# rate, LayerScale's start, crop, stride.
SEGMENTATION = {
    "ade20k_base_512_pt": (7e-4, 0.65, 0.1, 0.1, 512, 341),
    "ade20k_base_512": (3e-5, 0.9, 0.1, 0.1, 512, 341),
    "ade20k_base_640": (3e-5, 0.9, 0.1, 0.1, 640, 426),
    "ade20k_large_512": (2e-5, 0.95, 0.2, 1e-6, 512, 341),
    "ade20k_large_640": (2e-5, 0.95, 0.2, 1e-6, 640, 426),
    "ade20k_base_512_v2": (5e-5, 0.75, 0.15, 0.1, 512, 341),
    "ade20k_large_512_v2": (4e-5, 0.9, 0.2, 1e-6, 512, 341),
    "ade20k_base_setr_pup": (1e-3, 0.65, 0.1, None, 512, 341),
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_recipes_have_the_published_settings(name):
    config = load(name)
    assert (
        config.optimizer.learning_rate,
        config.optimizer.layer_decay,
        config.model.drop_path_rate,
        config.model.layer_scale_init,
        config.model.image_size,
        config.inference.stride,
    ) == SEGMENTATION[name]
    assert (config.run.steps, config.optimizer.warmup_steps) == (160_000, 1500)
    assert (config.run.batch_size, config.optimizer.weight_decay) == (16, 0.05)
    assert config.optimizer.schedule == "poly"
    assert config.optimizer.min_learning_rate == 0
    assert config.optimizer.decay_class_token
    assert config.optimizer.accumulate == (2 if name == "ade20k_large_640" else 1)
    assert config.data.normalization == "imagenet"
    assert config.data.zero_is_background
    assert (config.data.shorter, config.data.longer) == (
        config.model.image_size,
        4 * config.model.image_size,
    )
    assert (config.classes, len(config.labels)) == (150, 150)
    assert config.inference.scales == (1.0,)
    several = load("ade20k_base_640_ms").inference
    assert (len(several.scales), several.flip, several.fill_window) == (6, True, True)
