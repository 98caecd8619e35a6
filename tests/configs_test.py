"""Every published recipe: it parses, and its model has exactly the published size."""

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.models.heads import masked_image_model
from beit_jax.tokenizers.dvae import discrete_vae

# Official log (base: 91,965,776) and the sizes of the released checkpoints.
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
}
CONFIGS = Path(__file__).parent.parent / "configs"


def load(name):
    return jobs.parse_job(importlib.import_module(f"configs.{name}").get_config().to_dict())


def count(shapes):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_every_config_is_in_the_table():
    names = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert names == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    config = load(name)
    if config.task == "tokenizer":
        assert count(discrete_vae(config.tokenizer).shapes()) == PARAMETERS[name]
        return
    config = config.pretrain if config.task == "quickstart" else config
    model = masked_image_model(config.model, vocabulary=config.tokenizer.vocabulary)
    assert count(model.shapes()) == PARAMETERS[name]


def test_every_setting_can_be_overridden_on_the_command_line():
    """`--config.a.b=c` works for keys the file has: so the files have them all."""

    def missing(settings, section, path):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in section:
                yield f"{path}.{field.name}"
            elif dataclasses.is_dataclass(value):
                yield from missing(value, section[field.name], f"{path}.{field.name}")

    for name in ("beit_base", "dvae", "quickstart"):
        section = importlib.import_module(f"configs.{name}").get_config().to_dict()
        assert not list(missing(load(name), section, name))


def test_encoder_alone():
    """What is left for fine-tuning: no mask token, no head."""
    for name, encoder in (("beit_base", 85_665_360), ("beit_large", 303_136_192)):
        shapes = masked_image_model(load(name).model, vocabulary=8192).shapes()["encoder"]
        assert count({k: v for k, v in shapes.items() if k != "mask_token"}) == encoder


def test_the_recipes_numbers():
    """Paper table 12 and the README's commands, where they differ."""
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
