"""Settings drawn at random are refused in one line or within their ranges; others are noticed."""

import dataclasses
import typing

import pytest

from beit_jax import jobs
from beit_jax.config.bounds import Matching, Within
from tests.faults import settings


def test_drawn_settings_are_refused_in_one_line_or_in_their_ranges(tmp_path):
    row = settings.soak(count=300, seed=0, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 300


@pytest.mark.slow
def test_more_settings_are_refused_in_one_line_or_in_their_ranges(tmp_path):
    row = settings.soak(count=1_500, seed=1, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 1_500


def test_every_setting_of_every_config_file_can_be_drawn():
    found = settings.configs()
    assert len(found) > 10
    for name, values in found.items():
        assert settings.tried(values) == "within", name
        paths = list(settings.places(values))
        assert ("run", "steps") in paths or ("pretrain", "run", "steps") in paths


@dataclasses.dataclass(frozen=True)
class Inner:
    share: typing.Annotated[float, Within(ge=0, lt=1)] = 0.5
    sizes: tuple[typing.Annotated[int, Within(ge=1, le=9)], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: typing.Annotated[str, Matching(pattern="[a-z]+", what="", longest=5)] | None = "a"


def test_what_is_outside_of_its_range_is_seen():
    assert not list(settings.outside(Outer()))
    assert not list(settings.outside(Outer(name=None)))
    for inner in (Inner(share=1.0), Inner(share=1 - 1e-12), Inner(share=float("nan"))):
        (line,) = settings.outside(Outer(inner=inner))
        assert line.startswith("accepted: config.inner.share = ")
    assert len(list(settings.outside(Outer(inner=Inner(sizes=(0, 1, 10)))))) == 2
    assert list(settings.outside(Outer(inner=Inner(sizes=[1]))))
    for name in ("abcdef", "A", "", 3):
        assert list(settings.outside(Outer(name=name)))


def test_a_traceback_and_a_long_message_are_failures(monkeypatch):
    for error, seen in {
        KeyError("a"): "KeyError",
        settings.ConfigError("config.a: two\nlines"): "not one short line",
        settings.ConfigError("config.a: " + "x" * 2000): "not one short line",
        settings.ConfigError("wrong"): "names no setting",
        settings.ConfigError("config.a: wrong"): "refused",
    }.items():

        def fails(values, error=error):
            raise error

        monkeypatch.setattr(jobs, "parse_job", fails)
        assert settings.tried({}).startswith(seen)
