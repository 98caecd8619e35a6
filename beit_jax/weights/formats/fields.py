"""Reads settings out of JSON that somebody else wrote: every field classified, every value checked.

A foreign config describes a function. A field that is ignored may change that function, so a
format lists the fields it uses, those that must have certain values, and those that are known to
change nothing; a field in none of the lists is refused.

    check_fields(config, used=USED, only=ONLY, kept=KEPT, source="beit/config.json")
    width = integer(config, "hidden_size", default=768, source="beit/config.json")
"""

import sys
from collections.abc import Collection, Mapping, Sequence

from beit_jax.types import Json, JsonObject
from beit_jax.weights.report import WeightsError

# The largest size that any field may have. Shapes are worked out before tensors are compared.
_LARGEST = 1 << 20
_QUOTED = 80


def check_fields(
    config: JsonObject,
    *,
    used: Collection[str],
    only: Mapping[str, Sequence[Json]],
    kept: Collection[str],
    source: str,
) -> None:
    """Raises WeightsError for a field that is unknown or has a value that is another function.

    Args:
      config: the JSON object.
      used: names that the caller reads.
      only: name → the values that leave this project's function as it is.
      kept: names that change nothing in evaluation. Of any other name only null is.
      source: for messages.
    """
    for name, value in config.items():
        if value is None:  # not set
            continue
        if name in only:
            if not any(_same(value, good) for good in only[name]):
                raise WeightsError(
                    f"{source}: {quoted(name)} is {quoted(value)}; this project's models have"
                    f" {' or '.join(quoted(good) for good in only[name])}"
                )
        elif name not in used and name not in kept:
            raise WeightsError(
                f"{source}: {quoted(name)} is not known here, and a setting that is ignored may"
                " change what the model computes; delete it there, in a copy, if it does not"
            )


def _same(value: Json, good: Json) -> bool:
    # 1 == True, and 3 == 3.0: of these only the numbers are the same.
    return value == good and isinstance(value, bool) == isinstance(good, bool)


def quoted(value: Json) -> str:
    """A value as it is shown in a message: at most 80 characters, one line."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def integer(config: JsonObject, name: str, *, default: int, source: str, least: int = 1) -> int:
    """A whole number from `least` on; `default` where the field is missing or null."""
    value = _set(config, name, default)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not least <= value <= _LARGEST:
        raise WeightsError(f"{source}: {name} is {quoted(value)}, not a whole number from {least}")
    return int(value)


def number(
    config: JsonObject, name: str, *, default: float, source: str, least: float, most: float
) -> float:
    """A number between `least` and `most`; `default` where the field is missing or null."""
    value = _set(config, name, default)
    if not _is_finite(value) or not least <= value <= most:
        raise WeightsError(
            f"{source}: {name} is {quoted(value)}, not a number from {least:g} to {most:g}"
        )
    return float(value)


def flag(config: JsonObject, name: str, *, default: bool, source: str) -> bool:
    """True or false; `default` where the field is missing or null."""
    value = _set(config, name, default)
    if not isinstance(value, bool):
        raise WeightsError(f"{source}: {name} is {quoted(value)}, neither true nor false")
    return value


def side(config: JsonObject, name: str, *, default: int, source: str) -> int:
    """The side of a square: a whole number, or two equal ones."""
    value = _set(config, name, default)
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            raise WeightsError(
                f"{source}: {name} is {quoted(value)}; this project's models take squares"
            )
        value = value[0]
    return integer({name: value}, name, default=default, source=source)


def numbers(config: JsonObject, name: str, *, count: int, source: str) -> tuple[float, ...]:
    """A list of `count` finite numbers, or one number for all of them."""
    value = config[name]
    values = value if isinstance(value, list | tuple) else [value] * count
    if len(values) != count or not all(map(_is_finite, values)):
        raise WeightsError(f"{source}: {name} is {quoted(value)}, not {count} numbers")
    return tuple(float(v) for v in values)


def _set(config: JsonObject, name: str, default: Json) -> Json:
    value = config.get(name)
    return default if value is None else value


def _is_finite(value: Json) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < sys.float_info.max  # of an int without bounds, too; false for NaN


def numbered(names: JsonObject, *, count: int) -> tuple[str, ...]:
    """The names of classes 0, 1, ... of an object by class number; () where they are others."""
    if not all(str(key).isascii() and str(key).isdecimal() for key in names):
        return ()
    found = {int(key): str(name) for key, name in names.items()}
    if len(names) != count or sorted(found) != list(range(count)):
        return ()
    return tuple(found[i] for i in range(count))


def section(config: JsonObject, name: str, *, source: str) -> JsonObject:
    """A nested object; {} where the field is missing or null."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WeightsError(f"{source}: {name} is {quoted(value)}, not an object")
    return value
