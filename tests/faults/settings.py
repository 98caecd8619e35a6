"""Settings drawn by hypothesis in every config file: refused in one line, or as declared.

    soak(count=100_000, seed=0, folder=folder)

A value of any kind is put in the place of a setting or of a section, two at a time now and then.
What counts as survived: `jobs.parse_job` says in one short line what is wrong, or the config that
it gives has every number in the range, and every text in the length and grammar, of its field.
"""

import copy
import dataclasses
import importlib
import math
import re
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.config.bounds import Matching, OneOf, Within
from tests.faults.row import Row

_LONGEST = 1200  # characters of a message: a list of all keys of a section, or of all kinds
_SECONDS = 5  # of one parsing, on a machine with other things to do
_EDGES = (2**31, 2**31 - 1, 2**63, 2**63 - 1, 2**64, 10**12, 10**30, 10**400)

_texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "a\nb", "\0", "x" * 100_000, "../..", "\ud800", "$(id)", "~", "-1"]),
    st.builds(
        "{}:{}".format,
        st.sampled_from(["embedded", "folder", "tfds", "prepared", "hf", "gs", "", "a"]),
        st.sampled_from(
            ["", " ", "0", "-1", "9" * 30, "/nowhere", "//a/b", "a[:10%]", "\x00", "é"]
        ),
    ),
)
_numbers = st.one_of(
    st.integers(-3, 70_000),
    st.integers(),
    st.sampled_from([sign * edge for edge in _EDGES for sign in (1, -1)]),
    st.floats(),
    st.floats(-2, 2),
    st.sampled_from([1e-300, 1e39, 1e300, 1 - 1e-12, math.nan, math.inf, -math.inf, -0.0]),
)
_leaves = st.one_of(_numbers, _texts, st.none(), st.booleans(), st.binary(max_size=5))
VALUES = st.one_of(
    _leaves,
    _leaves,
    st.recursive(
        _leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(_texts, inner, max_size=3),
        ),
        max_leaves=6,
    ),
    st.sampled_from([object(), 1j, int, range(3), np.float32(1), np.int64(3), np.zeros(2)]),
)


def configs() -> dict[str, dict]:
    """The settings of every config file, by its name."""
    folder = Path(__file__).parents[2] / "configs"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return {
        name: importlib.import_module(f"configs.{name}").get_config().to_dict() for name in names
    }


def places(values: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all settings and sections."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Tries `count` changed configs. Hypothesis draws them; it does not simplify what fails."""
    found = configs()
    every = [(name, path) for name, values in found.items() for path in places(values)]
    failures: list[str] = []
    outcomes = {"refused": 0, "within": 0}
    longest = 0.0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.sampled_from(every), VALUES, st.one_of(st.none(), st.sampled_from(every)), VALUES
    )
    def attempt(place: tuple, value: object, second: tuple | None, other: object) -> None:
        nonlocal longest
        name, path = place
        changes = [(path, value)]
        if second is not None and second[0] == name:
            changes.append((second[1], other))
        values = copy.deepcopy(found[name])
        for keys, new in changes:
            _put(values, keys, new)
        began = time.monotonic()
        outcome = tried(values)
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        if outcome in outcomes and seconds < _SECONDS:
            outcomes[outcome] += 1
        else:
            what = ", ".join(f"{'.'.join(keys)} = {new!r:.80}" for keys, new in changes)
            failures.append(f"{name}: {what}: {outcome}, {seconds:.1f} s")

    attempt()
    # Where hypothesis finds nothing new to draw it stops early.
    survived = sum(outcomes.values())
    note = f"{outcomes['refused']} refused, {outcomes['within']} within their ranges;"
    note += f" at most {longest:.1f} s"
    return Row(
        part="settings",
        tried=survived + len(failures),
        survived=survived,
        failures=tuple(failures),
        note=note,
    )


def _put(values: dict, path: tuple[str, ...], new: object) -> None:
    *sections, last = path
    for key in sections:
        values = values[key]
        if not isinstance(values, dict):  # the first change has replaced it
            return
    values[last] = new


def tried(values: dict) -> str:
    """ "refused", "within", or what is wrong about how settings were taken."""
    try:
        config = jobs.parse_job(values)
    except ConfigError as error:
        text = str(error)
        if "\n" in text or not 0 < len(text) < _LONGEST:
            return f"not one short line but {text!r:.500}"
        return "refused" if text.startswith("config") else f"names no setting: {text:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return next(outside(config), "within")


def outside(config: object, path: str = "config") -> Iterator[str]:
    """What in a config is not as its field declares, told apart from the code that checks it."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from outside(value, name)
        else:
            yield from _outside(hints[field.name], value, name)


def _outside(hint: typing.Any, value: object, name: str) -> Iterator[str]:
    if hasattr(hint, "__metadata__"):
        for rule in hint.__metadata__:
            if not _fits(rule, value):
                yield f"accepted: {name} = {value!r:.80}, which is not {rule!r:.200}"
        return
    options = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            yield f"accepted: {name} is a {type(value).__name__}"
            return
        for part in value:
            yield from _outside(options[0], part, name)
    elif value is not None and options:
        for option in options:
            if option is not type(None):
                yield from _outside(option, value, name)


def _fits(rule: object, value: object) -> bool:
    if isinstance(rule, Within):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        seen = (value, float(np.float32(value))) if isinstance(value, float) else (value,)
        above = all(rule.gt < v if rule.ge is None else rule.ge <= v for v in seen)  # type: ignore[operator]
        below = all(v < rule.lt if rule.le is None else v <= rule.le for v in seen)  # type: ignore[operator]
        return above and below
    if isinstance(rule, Matching):
        empty = rule.empty and value == ""
        return isinstance(value, str) and (
            empty or (len(value) <= rule.longest and bool(re.fullmatch(rule.pattern, value)))
        )
    if isinstance(rule, OneOf):
        return value in (*rule.options, *rule.table)
    return True
