"""A wrong setting is one line with the setting's full name, before anything starts."""

import copy
import dataclasses

import pytest

from beit_jax import config, jobs
from beit_jax.config import ConfigError, ModelConfig
from beit_jax.tokenizers.dalle import DalleConfig
from configs import beit_base
from tests.tasks import tiny


def test_settings_survive_a_round_trip_through_plain_dicts():
    parsed = jobs.parse_job(tiny.pretrain().to_dict())
    assert jobs.parse_job(config.to_dict(parsed)) == parsed
    assert dataclasses.is_dataclass(parsed.data.mask)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.batchsize", 8, r"^config\.run\.batchsize: unknown key; the keys of config\.run are"),
        ("run.steps", "ten", r"^config\.run\.steps: expected int, got 'ten' \(str\)"),
        ("run.steps", True, r"^config\.run\.steps: expected int, got True"),
        ("run.steps", 0, r"^config\.run\.steps: must be at least 1, got 0"),
        ("model.image_size", 30, r"^config\.model\.image_size: 30 is not a multiple of patch_size"),
        ("model.positions", "rope", r"^config\.model\.positions: must be one of .*; got 'rope'"),
        (
            "optimizer.learning_rate",
            float("nan"),
            r"^config\.optimizer\.learning_rate: must be fin",
        ),
        ("optimizer.clip_norm", -1.0, r"^config\.optimizer\.clip_norm: must be positive"),
        ("optimizer.warmup_steps", 99, r"^config\.optimizer\.warmup_steps: 99 is more than"),
        ("data.mask.count", 17, r"^config\.data\.mask\.count: 17 patches .* of 16"),
        (
            "data.mask.kind",
            "stripes",
            r"^config\.data\.mask\.kind: must be one of block, .*stripes",
        ),
        ("data.image_size", 16, r"^config\.data\.image_size: 16, but the consumer takes 32"),
        (
            "data.augment.min_crop_scale",
            2.0,
            r"^config\.data\.augment\.min_crop_scale: must be at most 1, got 2",
        ),
        ("tokenizer.image_size", 32, r"^config\.tokenizer\.image_size: 32 gives 8 × 8 tokens"),
        ("tokenizer.kind", "vqgan", r"^config\.tokenizer\.kind: must be one of dalle, dvae; got"),
        ("tokenizer.kind", None, r"^config\.tokenizer\.kind: must be one of dalle, dvae; got"),
        (
            "tokenizer.kind",
            "dalle",
            r"^config\.tokenizer\.(levels|code\w+): . has no effect",
        ),
        ("tokenizer.depth", 3, r"^config\.tokenizer\.depth: unknown key; .* codebook_width, dtype"),
        (
            "run.keep_checkpoints",
            1,
            r"^config\.run\.keep_checkpoints: must be at least 2, got 1: one",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(key, value, message):
    values = tiny.pretrain().to_dict()
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    with pytest.raises(ConfigError, match=message) as caught:
        jobs.parse_job(values)
    assert "\n" not in str(caught.value)


def test_a_missing_or_unknown_task_is_an_error():
    values = tiny.pretrain().to_dict()
    del values["optimizer"]["learning_rate"]
    with pytest.raises(ConfigError, match=r"^config\.optimizer\.learning_rate: missing"):
        jobs.parse_job(values)
    with pytest.raises(ConfigError, match=r"^config\.task: must be one of .*; got 'dance'"):
        jobs.parse_job({"task": "dance"})


def test_integers_pass_as_floats_and_lists_as_tuples():
    @dataclasses.dataclass(frozen=True)
    class Numbers:
        rate: float
        sizes: tuple[int, ...] = ()
        limit: float | None = 1.0

    parsed = config.parse(Numbers, {"rate": 1, "sizes": [1, 2], "limit": None})
    assert parsed == Numbers(1.0, (1, 2), None)
    assert isinstance(parsed.rate, float)
    with pytest.raises(ConfigError, match=r"config\.sizes\[1\]: expected int, got 'x'"):
        config.parse(Numbers, {"rate": 1, "sizes": [1, "x"]})


def test_keys_of_other_kinds_stand_at_their_defaults_or_are_refused():
    """Config files hold every kind's keys; a key that would have no effect is refused."""
    values = beit_base.get_config().to_dict()
    assert jobs.parse_job(values).tokenizer == DalleConfig(path="dalle.safetensors")
    for key, value in (("levels", 2), ("codebook_width", 256), ("levels", "three")):
        changed = copy.deepcopy(values)
        changed["tokenizer"][key] = value
        message = rf"^config\.tokenizer\.{key}: {value!r} has no effect with kind 'dalle', only"
        with pytest.raises(ConfigError, match=message):
            jobs.parse_job(changed)


def test_which_settings_the_checkpoints_of_a_run_fix():
    """In pre-training the tokenizer is frozen: only its vocabulary is the size of something."""
    fixed = config.fixed_settings(jobs.parse_job(tiny.pretrain().to_dict()))
    assert [name for name in fixed if name.startswith("tokenizer")] == ["tokenizer.vocabulary"]
    trained = config.fixed_settings(jobs.parse_job(tiny.tokenizer().to_dict()))
    assert {name for name in trained if name.startswith("tokenizer")} == {
        f"tokenizer.{name}" for name in ("kind", "vocabulary", "width", "levels", "codebook_width")
    }


def test_a_run_keeps_its_normalization():
    """Other pixels are another function of the same parameters."""
    for name in ("pretrain", "classify"):
        fixed = config.fixed_settings(jobs.parse_job(getattr(tiny, name)().to_dict()))
        assert "data.normalization" in fixed


@pytest.mark.parametrize(
    ("init_from", "allowed", "message"),
    [
        ("runs/a", ("head",), r"init_allow_different\[0\]: must be one of heads, .*; got 'head'"),
        (
            "",
            ("heads",),
            r"init_allow_different: \('heads',\) would .* without init_from",
        ),
    ],
)
def test_facts_that_may_differ_are_known_ones_of_a_source(init_from, allowed, message):
    values = tiny.classify()
    values.run.init_from, values.run.init_allow_different = init_from, allowed
    with pytest.raises(ConfigError, match=rf"^config\.run\.{message}"):
        jobs.parse_job(values.to_dict())


def test_named_sizes_and_unrolling():
    base = ModelConfig.base(image_size=384, layers=6)
    assert (base.layers, base.width, base.heads, base.mlp_width) == (6, 768, 12, 3072)
    assert base == ModelConfig(layers=6, width=768, heads=12, mlp_width=3072, image_size=384)
    for named in (ModelConfig.tiny(), ModelConfig.small(), ModelConfig.base(), ModelConfig.large()):
        assert named.width == 64 * named.heads
        assert named.mlp_width == 4 * named.width
    assert ModelConfig.large().sizes == {
        "layers": 24,
        "width": 1024,
        "heads": 16,
        "mlp_width": 4096,
    }
    for unroll, blocks in ((0, 12), (1, 1), (5, 5), (12, 12), (24, 12)):
        assert ModelConfig.base(scan_unroll=unroll).blocks_per_step == blocks
    with pytest.raises(ConfigError, match="scan_unroll: must not be negative"):
        ModelConfig.base(scan_unroll=-1)
