"""Settings that a job does not use are refused by their full name, unless they are defaults."""

import dataclasses

import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.config.unused import NamesUnused, Unused, check_unused
from tests.tasks import tiny

# Of every job, a value that asks for something each of its unused settings cannot do.
REFUSED = {
    "classify": {"run.picture_every": 100, "optimizer.freeze_encoder": True},
    "pretrain": {"optimizer.freeze_encoder": True},
    "segment": {"data.service": ("host:1",)},
    "probe": {
        "run.picture_every": 100,
        "optimizer.decay_relative_positions": False,
        "optimizer.decay_class_token": True,
        "optimizer.freeze_encoder": True,
    },
    "tokenizer": {
        "tokenizer.path": "tokenizer.safetensors",
        "tokenizer.random_weights": True,
        "tokenizer.sha256": "0" * 64,
        "data.normalization": "imagenet",
        "data.token_cache": "/tokens",
        "data.mask.kind": "block_exact",
        "data.mask.count": 7,
        "data.mask.ratio": 0.5,
        "data.mask.min_block": 2,
        "data.mask.max_block": 9,
        "data.mask.min_aspect": 0.5,
        "optimizer.decay_relative_positions": False,
        "optimizer.decay_class_token": True,
        "optimizer.freeze_encoder": True,
    },
    "quickstart": {
        "pretrain.tokenizer.path": "tokenizer.safetensors",
        "probe.run.init_from": "elsewhere",
        "classify.run.init_from": "elsewhere",
        "classify.run.seed": 3,
        "tokenizer.run.compilation_cache": "/compiled",
        "probe.run.compilation_cache": "/compiled",
        "classify.run.compilation_cache": "/compiled",
        "pretrain.evaluate_only": True,
        "classify.evaluate_only": True,
        # Of the jobs inside it.
        "tokenizer.data.token_cache": "/tokens",
        "probe.run.picture_every": 100,
        "classify.run.picture_every": 100,
    },
}
CONFIGS = {
    "classify": tiny.classify,
    "pretrain": tiny.pretrain,
    "probe": lambda: tiny.story().probe,
    "quickstart": tiny.story,
    "segment": tiny.segment,
    "tokenizer": tiny.tokenizer,
}


def leaves(config, name):
    """The settings that a path names: itself, or all of a section."""
    for part in name.split("."):
        config = getattr(config, part)
    if not dataclasses.is_dataclass(config):
        return [name]
    return [f"{name}.{field.name}" for field in dataclasses.fields(config)]


@pytest.mark.parametrize("job", jobs.JOBS)
def test_every_unused_setting_is_refused(job):
    config = jobs.parse_job(CONFIGS[job]().to_dict())
    named = config.UNUSED if isinstance(config, NamesUnused) else {}
    assert {leaf for name in named for leaf in leaves(config, name)} <= set(REFUSED[job])
    for name, value in REFUSED[job].items():
        values = CONFIGS[job]()
        values.update_from_flattened_dict({name: value})
        with pytest.raises(ConfigError) as caught:
            jobs.parse_job(values.to_dict())
        message = str(caught.value)
        assert message.startswith(f"config.{name}: {value!r} would have no effect: "), message
        assert "\n" not in message


def test_defaults_and_accepted_values_pass():
    @dataclasses.dataclass(frozen=True)
    class Section:
        size: int
        name: str = "plain"

    @dataclasses.dataclass(frozen=True)
    class Config:
        section: Section
        length: int = 1

    Config.UNUSED = {
        "section": Unused("why", (Section(3, "other"),)),
        "length": Unused("why", (5,)),
    }
    for section in (Section(3), Section(3, "other")):
        for length in (1, 5):
            check_unused(Config(section, length))
    for config, message in (
        (Config(Section(4)), r"^job\.section\.size: 4 would have no effect: why; leave it at 3$"),
        (Config(Section(3, "x")), r"^job\.section\.name: 'x' .* leave it at 'plain'$"),
        (Config(Section(3), 2), r"^job\.length: 2 .* leave it at 1$"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_unused(config, path="job")
