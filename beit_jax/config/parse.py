"""Settings: frozen dataclasses, and the one place a config file becomes one.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`. `parse` turns it, once, into
the dataclass of the job it names, and rejects unknown keys, missing keys, wrong types and bad
values by the key's full name, before anything is compiled. Below this edge the code sees only
frozen dataclasses: no `config.get(key, default)`.

This file imports nothing from the package, so that every other part may import it.

    config = parse(DataConfig, {"source": "embedded", "image_size": 224, ...}, path="config.data")
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line and starts with the setting's full name."""


class RunError(RuntimeError):
    """A run can't go on. The message is one line and says why and what is safe."""


def check(condition: bool, name: str, message: str) -> None:
    """Raises `ConfigError("name: message")` unless `condition` holds.

    Inside a dataclass' `__post_init__`, `name` is the field's own name; `parse` puts the path of
    the section in front.
    """
    if not condition:
        raise ConfigError(f"{name}: {message}")


def parse(cls: type[T], values: Mapping[str, Any], *, path: str = "config") -> T:
    """Turns nested mappings into the frozen dataclass `cls`.

    Args:
      cls: a dataclass whose fields are int, float, bool, str, tuples of these, other such
        dataclasses, or `X | None`.
      values: mapping from field name to value (a `ConfigDict` or a dict from JSON).
      path: the section's full name, for messages.

    Returns:
      An instance of `cls`.

    Raises:
      ConfigError: an unknown key, a missing key, a wrong type, or a value `cls` rejects.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "keys"):
        raise ConfigError(f"{path}: expected a section with keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{path}.{key}: unknown key; the keys of {path} are: {known}")
    parsed = {}
    for name, field in fields.items():
        if name in values:
            parsed[name] = _value(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: missing")
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


def _value(hint: Any, value: Any, name: str) -> Any:
    """Checks one value against a type hint; ints pass as floats, lists as tuples."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
        return _value(hint, value, name)
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, path=name)
    if origin is tuple:
        item, *_ = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_value(item, each, f"{name}[{i}]") for i, each in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{name}: expected {hint.__name__}, got {value!r} ({type(value).__name__})"
        )
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name}: must be finite, got {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain nested dicts and lists that `parse` and JSON take."""
    plain = dataclasses.asdict(config)

    def listify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listify(item) for key, item in value.items()}
        return [listify(item) for item in value] if isinstance(value, tuple) else value

    return listify(plain)


def one_of(value: str, name: str, *options: str) -> None:
    """Raises `ConfigError` unless `value` is among `options`."""
    check(value in options, name, f"must be one of {', '.join(options)}; got {value!r}")
