"""Every setting has a range or a grammar, and what is outside is one short line with its name."""

import dataclasses
import importlib
import math
import pathlib
import random
import re
import typing

import jax
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError, ModelConfig, parse
from beit_jax.config.bounds import Matching, OneOf, Rule, Within, check_fields
from beit_jax.config.parse import shown
from beit_jax.data import source_kinds
from beit_jax.tokenizers.kinds import KINDS
from tests.tasks import tiny

TINY = {
    "classify": tiny.classify,
    "pretrain": tiny.pretrain,
    "probe": lambda: tiny.story().probe,
    "quickstart": tiny.story,
    "tokenizer": tiny.tokenizer,
}
RECIPES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "__init__"
)
LONGEST = 1200  # characters of a message: a list of all keys of a section, or of all kinds


def refusal(values):
    """The message with which settings are refused; fails where they are accepted."""
    with pytest.raises(ConfigError) as caught:
        jobs.parse_job(values)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < LONGEST, message
    return message


# ---------------------------------------------------------------------------- declarations


def undeclared(cls, path):
    """Full names of the numbers without bounds and the texts without a grammar."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if typing.get_origin(hint) is not typing.ClassVar:
            yield from _undeclared(hint, f"{path}.{name}")


def _undeclared(hint, path, rules=()):
    if hasattr(hint, "__metadata__"):
        yield from _undeclared(hint.__origin__, path, hint.__metadata__)
    elif dataclasses.is_dataclass(hint):
        yield from undeclared(hint, path)
    elif hint in (int, float):
        if not any(isinstance(rule, Within) for rule in rules):
            yield path
    elif hint is str:
        if not any(isinstance(rule, Rule) and not isinstance(rule, Within) for rule in rules):
            yield path
    elif typing.get_args(hint):
        for part in typing.get_args(hint):
            yield from _undeclared(part, path)
    else:
        assert hint in (bool, type(None), ...), (path, hint)


@pytest.mark.parametrize(
    "cls",
    [
        *(kind.config for kind in jobs.JOBS.values()),
        *(kind.config for kind in KINDS.values()),
    ],
)
def test_every_number_has_bounds_and_every_text_a_grammar(cls):
    assert not list(undeclared(cls, cls.__name__))


def test_the_walk_finds_a_field_without_bounds():
    @dataclasses.dataclass
    class Inner:
        good: typing.Annotated[int, Within(ge=0, le=1)] | None
        bad: tuple[float, ...] = ()

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        text: str
        flag: bool = False

    Outer.__annotations__["inner"] = Inner  # names of this function are not the module's
    assert list(undeclared(Outer, "outer")) == ["outer.inner.bad", "outer.text"]


def ranges(config, path=""):
    """Full name, type, rule, and whether it is that of items, of every number of a config."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from ranges(value, f"{name}.")
        else:
            yield from ((name, *found) for found in _ranges(hints[field.name], many=False))


def _ranges(hint, *, many):
    if hasattr(hint, "__metadata__"):
        for rule in hint.__metadata__:
            if isinstance(rule, Within):
                yield hint.__origin__, rule, many
        return
    for part in typing.get_args(hint):
        yield from _ranges(part, many=many or typing.get_origin(hint) is tuple)


def beyond(rule, kind):
    """Values of the type that are just, and far, outside a range."""
    low = rule.ge if rule.gt is None else rule.gt
    high = rule.le if rule.lt is None else rule.lt
    if kind is int:
        return low - 1, high + 1, -(10**30), 10**30
    return (
        float(np.nextafter(np.float32(low), np.float32(-1))) if rule.gt is None else low,
        float(np.nextafter(np.float32(high), np.float32(math.inf))) if rule.lt is None else high,
        -1e300,
        1e300,
    )


# Each section of the quickstart is the config of another job.
@pytest.mark.parametrize("job", sorted(TINY.keys() - {"quickstart"}))
def test_every_bound_is_kept_under_the_full_name(job):
    values = TINY[job]().to_dict()
    found = list(ranges(jobs.parse_job(values)))
    assert len(found) > 30
    for name, kind, rule, many in found:
        section, key = place(values, name)
        before = section[key]
        for value in beyond(rule, kind):
            section[key] = (value,) if many else value
            message = refusal(values)
            assert message.startswith(f"config.{name}"), (value, message)
        section[key] = before
    jobs.parse_job(values)


def place(values, name):
    """The section that holds a setting, and its key."""
    *sections, last = name.split(".")
    for key in sections:
        values = values[key]
    return values, last


# ---------------------------------------------------------------------------- values


# Settings of `tiny`'s jobs that used to end in a traceback or a hang, or were accepted.
NONSENSE = (
    ("pretrain", "run.seed", -1, "must not be negative"),
    ("pretrain", "run.seed", 2**31, "must be at most"),
    ("pretrain", "run.seed", 2**64, "must be at most"),
    ("pretrain", "run.seed", 10**5000, "must be at most .* a number of 16610 bits"),
    ("pretrain", "run.steps", 2**31, "must be at most 2147483647, got 2147483648"),
    ("pretrain", "run.steps", "x" * 100_000, r"expected int, got 'x+\.\.\.x+' \(str\)"),
    ("pretrain", "optimizer.hold_steps", 10**12, "must be at most"),
    ("pretrain", "data.workers", 100_000, "must be at most 1024"),
    ("pretrain", "data.workers", 2**63, "must be at most 1024"),
    ("pretrain", "data.augmentation_cycle", 10**12, "must be at most"),
    ("pretrain", "tokenizer.levels", -1, "must be at least 1"),
    ("pretrain", "tokenizer.levels", 2**31, "must be at most 10"),
    ("tokenizer", "tokenizer.levels", 10**12, "must be at most 10"),
    ("pretrain", "tokenizer.codebook_width", 0, "must be at least 1"),
    ("pretrain", "tokenizer.codebook_width", -1, "must be at least 1"),
    ("pretrain", "optimizer.beta1", 1.0, "must be less than 1"),
    ("pretrain", "optimizer.beta1", -1.0, "must not be negative"),
    ("pretrain", "optimizer.beta2", 1.0, "must be less than 1"),
    ("pretrain", "optimizer.beta2", 1 - 1e-12, "must be less than 1"),
    ("pretrain", "optimizer.epsilon", 0.0, "must be positive"),
    ("pretrain", "optimizer.epsilon", -1.0, "must be positive"),
    ("pretrain", "optimizer.epsilon", 1e-300, "too close to 0 for float32"),
    ("pretrain", "optimizer.learning_rate", 1e300, "must be at most"),
    ("pretrain", "optimizer.learning_rate", 10**400, "a number of .* bits is too large"),
    ("pretrain", "optimizer.min_learning_rate", 1e39, "must be at most"),
    ("pretrain", "optimizer.weight_decay", 1e300, "must be at most"),
    ("pretrain", "optimizer.clip_norm", 1e-300, "too close to 0"),
    ("pretrain", "optimizer.ema_decay", 0.9999999999, "must be less than 1"),
    ("pretrain", "model.layer_norm_epsilon", -1.0, "must be positive"),
    ("pretrain", "model.layer_norm_epsilon", 0.0, "must be positive"),
    ("pretrain", "model.layer_scale_init", 1e300, "must be at most"),
    ("pretrain", "model.layer_scale_init", -5.0, "must not be negative"),
    ("pretrain", "model.width", 10**12, "must be at most"),
    ("pretrain", "model.attention", [], "expected str"),
    ("pretrain", "data.mask.min_aspect", 1e-300, "too close to 0"),
    ("pretrain", "data.mask.max_block", 0, "must be at least 1"),
    ("pretrain", "run.batch_size", 10**12, "must be at most"),
    ("pretrain", "run.checkpoint_minutes", 1e308, "must be at most"),
    ("pretrain", "run.init_allow_missing", ("abc",), "no effect without init_from"),
    ("pretrain", "run.init_allow_missing", "abc", "expected a list"),
    ("pretrain", "run.init_allow_missing", (1, 2), "expected str"),
    ("pretrain", "run.init_from", "a\nb", "path without control characters, got 'a"),
    ("pretrain", "run.init_from", " ", "path without control characters"),
    ("pretrain", "run.init_from", "x" * 100_000, "100000 characters are more than 4096"),
    ("pretrain", "run.compilation_cache", "\0", "path without control characters"),
    ("pretrain", "data.source", "abc", "must be embedded, .*; got 'abc'"),
    ("pretrain", "data.source", "", "is empty"),
    ("pretrain", "data.source", "folder:", "no such folder: ''"),
    ("pretrain", "data.source", "prepared: ", "no such folder: ' '"),
    ("pretrain", "data.source", "tfds:", "no name of a TFDS"),
    ("pretrain", "data.source", "tfds:../../etc", "no name of a TFDS"),
    ("pretrain", "data.source", "embedded:0", "positive whole number"),
    ("pretrain", "data.source", "embedded:-1", "positive whole number"),
    ("pretrain", "data.source", "embedded:" + "9" * 20, "positive whole number"),
    ("pretrain", "data.source", "embedded:\u0663", "positive whole number"),
    ("pretrain", "data.eval_source", "abc", "must be embedded, .*; got 'abc'"),
    ("classify", "data.source", "../..", "must be KIND or KIND:VALUE"),
    ("pretrain", "data.split", "", "is empty"),
    ("pretrain", "data.eval_split", " ", "must be a split"),
    ("pretrain", "data.split", "x" * 100_000, "100000 characters"),
    ("pretrain", "data.service", ("a",), "'a' is not host:port"),
    ("pretrain", "data.service", ("a:0",), "'a:0' is not host:port"),
    ("pretrain", "data.service", ("a:65536",), "is not host:port"),
    ("pretrain", "tokenizer.sha256", "abc", "64 hexadecimal digits"),
    ("pretrain", "reference", "two\nlines", "one line"),
    ("pretrain", "task", ["pretrain"], "must be one of"),
    ("pretrain", "task", {"a": 1}, "must be one of"),
    ("quickstart", "pretrain.task", "probe", "must be one of pretrain; got 'probe'"),
    ("quickstart", "seeds", (0, -1), r"must not be negative"),
    ("probe", "neighbours.counts", (10**12,), "must be at most"),
    ("probe", "cached_views", 10**12, "must be at most"),
    ("classify", "classes", 10**12, "must be at most"),
    ("classify", "mixing.mixup", 1e300, "must be at most"),
    ("classify", "head_init_scale", 1e300, "must be at most"),
    ("tokenizer", "vae.temperature_end", 0.0, "must be at least 0.0001"),
    ("tokenizer", "vae.kl_weight", 1e300, "must be at most"),
    ("pretrain", "run", 1, "expected a section"),
    ("pretrain", "run", [[["a"]]], "expected a section"),
)


@pytest.mark.parametrize(("job", "name", "value", "message"), NONSENSE, ids=shown)
def test_nonsense_is_one_line_that_names_the_setting(job, name, value, message):
    values = TINY[job]().to_dict()
    section, key = place(values, name)
    section[key] = value
    found = refusal(values)
    assert re.match(rf"config\.{re.escape(name)}(\[\d\])?: .*{message}", found), found


@pytest.mark.parametrize(
    ("job", "name", "value"),
    [
        ("pretrain", "run.seed", 2**31 - 1),
        # Compared with steps and counts, never computed with: "never" and "all".
        ("pretrain", "run.log_every", 10**12),
        ("pretrain", "run.eval_batches", 10**12),
        ("pretrain", "optimizer.max_bad_steps", 10**12),
        ("pretrain", "optimizer.learning_rate", 1000),
        ("pretrain", "optimizer.beta1", 0),
        ("pretrain", "model.layer_scale_init", None),
        ("pretrain", "model.drop_path_rate", 0.999999),
        ("pretrain", "data.split", "train[:10%]+validation"),
        ("pretrain", "data.eval_source", "tfds:my_set/config:1.0.0"),
        ("pretrain", "data.eval_source", "folder:/data/caf\u00e9 \u2603/\udcff"),
        ("pretrain", "data.eval_source", "folder:gs://bucket/photos"),
        ("pretrain", "data.service", ["worker-1:5050", "[::1]:5050"]),
        ("pretrain", "tokenizer.sha256", "0" * 64),
        ("classify", "labels", ("n01440764", "a folder\nwith a line", "\udcff")),
        ("classify", "run.init_allow_missing", ("fc_norm", "encoder/blocks.0")),
    ],
)
def test_values_that_make_sense_are_taken(job, name, value):
    values = TINY[job]().to_dict()
    section, key = place(values, name)
    section[key] = value
    jobs.parse_job(values)


# ---------------------------------------------------------------------------- at random

ODD = (
    *(-1, 0, 1, 2**31, 2**63, 10**12, 10**30, 10**5000, -(10**12)),
    *(-0.5, 1.5, 1e-300, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", " ", "abc", "\u00fc\u2603", "a\nb", "\0", "x" * 100_000, "\udcff", "../..", "folder:"),
    *(None, True, [], (), [1], ("a",), [None], [[["a"]]], {}, {"a": 1}, {"a\nb": 1}, {1: 2}),
    *(b"bytes", 1j, object(), [10**5000], ["x" * 100_000]),
)


def all_places(section, path=()):
    for key, value in section.items():
        yield section, key, ".".join((*path, key))
        if isinstance(value, dict):
            yield from all_places(value, (*path, key))


def test_odd_values_anywhere_are_taken_or_refused_in_one_line():
    """800 of the 150,000 pairs of a setting and a value, the same in every run."""
    draw = random.Random(0)
    settings = []
    for name in RECIPES:
        values = importlib.import_module(f"configs.{name}").get_config().to_dict()
        settings += [(values, *found) for found in all_places(values)]
    refused = 0
    for _ in range(800):
        values, section, key, name = draw.choice(settings)
        before, section[key] = section[key], draw.choice(ODD)
        try:
            jobs.parse_job(values)
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert message.startswith("config."), (name, message)
            assert "\n" not in message, (name, message)
            assert len(message) < LONGEST, (name, message)
        finally:
            section[key] = before
    assert refused > 500


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("x" * 78, "'" + "x" * 78 + "'"),
        ("x" * 79, "'" + "x" * 37 + "..." + "x" * 37 + "'"),
        ("/a" + "b" * 10_000 + "/c", "'/a" + "b" * 35 + "..." + "b" * 35 + "/c'"),
        (["x" * 100], "['" + "x" * 36 + "..." + "x" * 36 + "']"),
        (10**5000, "a number of 16610 bits"),
        ([10**5000], "a list"),
        ("a\nb", "'a\\nb'"),
    ],
    ids=shown,
)
def test_a_message_quotes_at_most_80_characters(value, text):
    assert shown(value) == text
    assert len(text) <= 80


def test_a_list_too_deep_to_be_written_out_is_quoted():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list"


def test_a_range_holds_in_float32_too():
    rule = Within(ge=0, lt=1)
    rule.check(1 - 1e-6, "x")
    rule.check(np.float32(0.5), "x")
    for value, message in (
        (1 - 1e-12, "x: must be less than 1, got 0.999999999999"),
        (1e-46, "x: 1e-46 is too close to 0 for float32"),
        (math.nan, "x: must be finite, got nan"),
        (True, "x: expected a number, got True"),
        ("1", "x: expected a number, got '1'"),
    ):
        with pytest.raises(ConfigError) as caught:
            rule.check(value, "x")
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="one lower and one upper bound"):
        Within(ge=0)


def test_rules_hold_wherever_a_config_is_made():
    """Not only in `parse`: a section built in Python is checked by its own field names."""

    @dataclasses.dataclass(frozen=True)
    class Section:
        rate: typing.Annotated[float, Within(gt=0, le=1)] | None = None
        names: tuple[typing.Annotated[str, Matching(pattern="[a-z]+", what="letters")], ...] = ()
        kind: typing.Annotated[str, OneOf("a", table={"b": 1})] = "b"

        def __post_init__(self):
            check_fields(self)

    assert Section(rate=0.5, names=("x",), kind="a") == parse(
        Section, {"rate": 0.5, "names": ["x"], "kind": "a"}
    )
    for changes, message in (
        ({"rate": 2.0}, "rate: must be at most 1, got 2.0"),
        ({"names": ("x", "1")}, "names[1]: must be letters, got '1'"),
        ({"kind": "c"}, "kind: must be one of a, b; got 'c'"),
    ):
        with pytest.raises(ConfigError) as caught:
            Section(**changes)
        assert str(caught.value) == message
        with pytest.raises(ConfigError) as caught:
            parse(Section, changes, path="config.section")
        assert str(caught.value) == f"config.section.{message}"


def test_a_grid_too_fine_for_attention_is_refused_before_anything_is_computed_on_it():
    ModelConfig.base(image_size=256, patch_size=1)
    with pytest.raises(ConfigError, match=r"image_size: 16384 × 16384 patches are more than 256"):
        ModelConfig.base(image_size=16_384, patch_size=1)


def test_kernels_of_another_platform_are_refused_where_a_run_starts():
    values = tiny.story()
    values.pretrain.model.attention = "cudnn"
    config = jobs.parse_job(values.to_dict())
    jobs.check_platform(config, platform="gpu")
    message = r"^config\.pretrain\.model\.attention: 'cudnn' is a kernel for gpu, .* on cpu; take"
    with pytest.raises(ConfigError, match=message):
        jobs.check_platform(config, platform="cpu")
    assert jax.default_backend() == "cpu"
    with pytest.raises(ConfigError, match=message):
        jobs.run(values.to_dict(), workdir="/nowhere")


def test_a_kind_of_source_from_outside_is_known_to_the_settings(monkeypatch):
    values = tiny.pretrain()
    values.data.source = "mine:3"
    assert refusal(values.to_dict()).startswith("config.data.source: must be embedded, ")
    mine = source_kinds.Kind("mine:N", lambda request: None, lambda value: "" if value else "empty")
    monkeypatch.setitem(source_kinds.KINDS, "mine", mine)
    jobs.parse_job(values.to_dict())
    values.data.source = "mine:"
    assert refusal(values.to_dict()) == "config.data.source: empty"
