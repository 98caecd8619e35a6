"""What values of a setting make sense, declared in the type of its field.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MyConfig:
        layers: Annotated[int, Within(ge=1, le=1000)]
        dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
        sizes: tuple[Count, ...] = ()

        def __post_init__(self) -> None:
            check_fields(self)

Every number of a config has a lower and an upper bound, and every text a grammar or a list of
options: `tests/config/bounds_test.py` walks the configs of all jobs and names a field without. A
bound is what the code below can take (int32 counters, float32 arithmetic) or, far beyond any run
that was ever reported, what can only be a slip.
"""

import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from beit_jax.config.parse import ConfigError, check, field_types, one_of, shown
from beit_jax.types import ConfigDataclass, Json

INT32 = 2**31 - 1
INT64 = 2**63 - 1
_TINY = float(np.finfo(np.float32).tiny)


@runtime_checkable
class Rule(Protocol):
    """What stands in `Annotated[type, rule]`."""

    def check(self, value: Json, name: str) -> None:
        """Raises `ConfigError("name: ...")` for a value that makes no sense."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within:
    """A range of numbers: one lower and one upper bound.

    Floats are computed with in float32, so they must be in the range as float32 too: 1 - 1e-12 is 1
    there, and 1e-300 is 0.

    Attributes:
      ge, gt: the lower bound, itself in the range (`ge`) or not.
      le, lt: the upper bound.
      why: reason for the lower bound, for its message; or "".
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if (self.ge is None) == (self.gt is None) or (self.le is None) == (self.lt is None):
            raise ValueError(f"{self}: needs one lower and one upper bound")

    def check(self, value: Json, name: str) -> None:
        """Raises ConfigError unless `value` is a number in the range."""
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        check(number, name, f"expected a number, got {shown(value)}")
        compared: tuple[Json, ...] = (value,)
        if isinstance(value, float):
            check(math.isfinite(value), name, f"must be finite, got {shown(value)}")
            with np.errstate(over="ignore"):
                compared = (value, np.float32(value))
            tiny = value != 0 and abs(value) < _TINY
            check(not tiny, name, f"{shown(value)} is too close to 0 for float32")
        if not all(self._above(each) for each in compared):
            raise ConfigError(f"{name}: {self._lower()}, got {shown(value)}{self._reason()}")
        if not all(self._below(each) for each in compared):
            raise ConfigError(f"{name}: {self._upper()}, got {shown(value)}")

    def _above(self, value: Any) -> bool:
        return bool(value >= self.ge if self.gt is None else value > self.gt)

    def _below(self, value: Any) -> bool:
        return bool(value <= self.le if self.lt is None else value < self.lt)

    def _lower(self) -> str:
        if self.gt is not None:
            return "must be positive" if self.gt == 0 else f"must be more than {self.gt}"
        return "must not be negative" if self.ge == 0 else f"must be at least {self.ge}"

    def _upper(self) -> str:
        return f"must be at most {self.le}" if self.lt is None else f"must be less than {self.lt}"

    def _reason(self) -> str:
        return f": {self.why}" if self.why else ""


class OneOf:
    """A text that is one of a few. A mapping is looked up when a config is checked."""

    def __init__(self, *options: str, table: Iterable[str] = ()) -> None:
        self.options = options
        self.table = table

    def check(self, value: Json, name: str) -> None:
        """Raises ConfigError unless `value` is an option."""
        one_of(value, name, *self.options, *self.table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """A text with a grammar.

    Attributes:
      pattern: a regular expression that the whole text matches; "." is any character but a newline.
      what: the end of "must be ...".
      longest: characters.
      empty: whether "" will do too.
    """

    pattern: str
    what: str
    longest: int = 200
    empty: bool = False

    def check(self, value: Json, name: str) -> None:
        """Raises ConfigError unless `value` is such a text."""
        check(isinstance(value, str), name, f"expected str, got {shown(value)}")
        if self.empty and not value:
            return
        check(bool(value), name, f"is empty, but must be {self.what}")
        size = len(value)
        check(size <= self.longest, name, f"{size} characters are more than {self.longest}")
        matches = re.fullmatch(self.pattern, value) is not None
        check(matches, name, f"must be {self.what}, got {shown(value)}")


def check_fields(config: ConfigDataclass) -> None:
    """Checks every field against the rules in its type; for `__post_init__`.

    Raises:
      ConfigError: a value makes no sense. The message starts with the field's own name.
    """
    for name, hint in field_types(type(config)).items():
        _check(hint, getattr(config, name), name)


def _check(hint: Any, value: Json, name: str) -> None:
    if hasattr(hint, "__metadata__"):  # Annotated[...]
        _check(hint.__origin__, value, name)
        for rule in hint.__metadata__:
            if isinstance(rule, Rule):
                rule.check(value, name)
        return
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union) and value is not None:
        for option in typing.get_args(hint):
            _check(option, value, name)
    elif origin is tuple and isinstance(value, (list, tuple)):
        item, *_ = typing.get_args(hint)
        for index, part in enumerate(value):
            _check(item, part, f"{name}[{index}]")


# Numbers. Steps are counted in int32 on the device, and so is whatever is at most a run's length.
Count: TypeAlias = Annotated[int, Within(ge=1, le=INT32)]
Whole: TypeAlias = Annotated[int, Within(ge=0, le=INT32)]
# Compared with steps or counts, never computed with: any large number says "never", or "all".
Period: TypeAlias = Annotated[int, Within(ge=1, le=INT64)]
PeriodOrNever: TypeAlias = Annotated[int, Within(ge=0, le=INT64)]
# The images' order and augmentation know 31 bits of it; two seeds must not be the same run.
Seed: TypeAlias = Annotated[int, Within(ge=0, le=INT32)]
Pixels: TypeAlias = Annotated[int, Within(ge=1, le=16_384)]
Classes: TypeAlias = Annotated[int, Within(ge=0, le=10_000_000)]
Block: TypeAlias = Annotated[int, Within(ge=1, le=1000, why="blocks are numbered from 1")]
Temperature: TypeAlias = Annotated[float, Within(ge=1e-4, le=1000)]
Share: TypeAlias = Annotated[float, Within(ge=0, le=1)]
Rate: TypeAlias = Annotated[float, Within(ge=0, lt=1)]  # a probability that cannot be certain

# Texts.
Name: TypeAlias = Annotated[
    str, Matching(pattern=r"[A-Za-z][\w-]*", what="a word of letters, digits, _ and -")
]
# A line that is shown and not read: what is longer is not one.
Line: TypeAlias = Annotated[
    str, Matching(pattern=r"[^\0-\x1f\x7f]*", what="one line of text", longest=1000, empty=True)
]
# A class is named as its folder is, whatever that has.
Label: TypeAlias = Annotated[
    str, Matching(pattern=r"(?s)[^\0]*", what="a text without NUL", longest=1000, empty=True)
]
# Local or gs://; 4096 is the longest that Linux takes.
Path: TypeAlias = Annotated[
    str,
    Matching(
        pattern=r"[^\0-\x1f\x7f]*[^\0-\x20\x7f][^\0-\x1f\x7f]*",
        what="a path without control characters",
        longest=4096,
    ),
]
PathOrNone: TypeAlias = Annotated[
    str,
    Matching(
        pattern=r"[^\0-\x1f\x7f]*[^\0-\x20\x7f][^\0-\x1f\x7f]*",
        what="a path without control characters",
        longest=4096,
        empty=True,
    ),
]
Sha256: TypeAlias = Annotated[
    str, Matching(pattern=r"[0-9a-f]{64}", what="64 hexadecimal digits, lower case", empty=True)
]
ParameterName: TypeAlias = Annotated[
    str, Matching(pattern=r"[\w.-]+(/[\w.-]+)*", what="a parameter's name, such as encoder/norm")
]


@dataclasses.dataclass(frozen=True)
class _Address:
    """host:port."""

    def check(self, value: Json, name: str) -> None:
        host, _, port = value.rpartition(":")
        fits = re.fullmatch(r"[\w.-]{1,253}|\[[0-9A-Fa-f:.%\w]{2,60}\]", host) is not None
        number = re.fullmatch(r"[0-9]{1,5}", port) is not None and 1 <= int(port) <= 65_535
        check(
            fits and number,
            name,
            f"{shown(value)} is not host:port with a port from 1 to 65535",
        )


ADDRESS = _Address()
Address: TypeAlias = Annotated[str, ADDRESS]
