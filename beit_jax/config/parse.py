"""From a config file to frozen dataclasses, the only form of settings that the code below sees.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`. `parse` turns it, once, into
the dataclass of the job it names, and rejects unknown keys, missing keys, wrong types and bad
values by the key's full name, before anything is compiled. No code below calls
`config.get(key, default)`.

Of the package, this file imports only names of types, so every other part may import it.

    config = parse(DataConfig, {"source": "embedded", "image_size": 224, ...}, path="config.data")
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from beit_jax.types import ConfigDataclass, JsonObject, Setting

T = TypeVar("T")

# Values of a field's metadata under this key: `shape_setting` and the functions below it.
_FIXES = "fixes"
SHAPES, PRESENCE, UNIT, ONCE = "shapes", "presence", "unit", "once"
_QUOTED = 80  # characters of a value in a message


class ConfigError(ValueError):
    """A setting is wrong. The message is one line and starts with the setting's full name."""


class RunError(RuntimeError):
    """A run cannot continue. The message is one line and says why, and what was saved."""


def check(condition: bool, name: str, message: str) -> None:
    """Raises `ConfigError("name: message")` unless `condition` holds.

    Inside a dataclass's `__post_init__`, `name` is the field's own name; `parse` puts the path of
    the section in front.
    """
    if not condition:
        raise ConfigError(f"{name}: {message}")


def shown(value: Setting) -> str:
    """A value as a message quotes it: at most 80 characters of its `repr`, whatever it is.

    Of a longer one the middle is left out: the end of a path says most.
    """
    if isinstance(value, int) and value.bit_length() > 200:  # Python won't write out thousands
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > 2 * _QUOTED:
        value = value[:_QUOTED] + value[-_QUOTED:]  # a repr is at least as long
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of what a container holds
        text = f"a {type(value).__name__}"
    half = (_QUOTED - 3) // 2
    return text if len(text) <= _QUOTED else f"{text[:half]}...{text[-half:]}"


class HasConfig(Protocol):
    """An option of a `Choice`: anything with the dataclass of its settings."""

    @property
    def config(self) -> type: ...


@dataclasses.dataclass(frozen=True)
class Choice:
    """Marks a section whose dataclass is chosen by one of its own keys.

        tokenizer: Annotated[TokenizerConfig, Choice("kind", KINDS)]

    A config file may hold the keys of all options, so that each can be overridden on the command
    line. A key that only other options have must stand at its default there: a setting that would
    have no effect is refused, not ignored.

    Attributes:
      key: the key that chooses.
      options: by that key's value. Looked up when a config is parsed, so that an option may be
        added after the annotation was made.
    """

    key: str
    options: Mapping[str, HasConfig]


def shape_setting(default: Setting = dataclasses.MISSING) -> Setting:
    """A dataclass field that fixes the shapes of trained arrays, or their meaning.

    A run's checkpoints fit only the value they were written with.

        width: int = shape_setting(256)
    """
    return dataclasses.field(default=default, metadata={_FIXES: SHAPES})


def presence_setting(default: Setting = None) -> Setting:
    """A dataclass field whose value may change in a run, but not from or to None."""
    return dataclasses.field(default=default, metadata={_FIXES: PRESENCE})


def unit_setting(default: Setting = 1.0) -> Setting:
    """A dataclass field whose value may change in a run, but not from or to 1.

    At 1 a part of the optimizer is left out, and its state does not fit another one's.
    """
    return dataclasses.field(default=default, metadata={_FIXES: UNIT})


def once_setting(default: Setting = ()) -> Setting:
    """A dataclass field that stays as it is once it has a value: the names of outputs, say."""
    return dataclasses.field(default=default, metadata={_FIXES: ONCE})


def may_change(how: str | None, *, was: Setting, now: Setting, absent: Setting = None) -> bool:
    """Whether a run's checkpoints fit another value of a setting.

    Args:
      how: from `fixed_settings`; None for any other setting.
      was: its value in the checkpoints.
      now: its value now, another one.
      absent: stands for a value where the setting is missing.
    """
    if how == PRESENCE:
        return was not in (None, absent) and now not in (None, absent)
    if how == UNIT:
        return 1 not in (was, now) or absent in (was, now)
    if how == ONCE:
        return was in (None, absent, "", [], ())
    return how is None


def fixes(*names: str) -> dict[str, frozenset[str]]:
    """Metadata of a section of which only these shape settings concern trained arrays.

    # A frozen part: only the head's size depends on it.
    tokenizer: TokenizerConfig = dataclasses.field(metadata=fixes("vocabulary"))
    """
    return {_FIXES: frozenset(names)}


def fixed_settings(
    config: ConfigDataclass | type[ConfigDataclass], path: str = ""
) -> dict[str, str]:
    """Which settings a run's checkpoints fix.

    Args:
      config: a parsed config, or its class (which lacks the settings that a `Choice` adds).
      path: the prefix of the names.

    Returns:
      Full name → `SHAPES`, `PRESENCE`, `UNIT` or `ONCE`.
    """
    return dict(_fixed_settings(config, path))


def _fixed_settings(
    config: ConfigDataclass | type[ConfigDataclass], path: str
) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        name = f"{path}.{field.name}" if path else field.name
        fixed = field.metadata.get(_FIXES)
        value = getattr(config, field.name, None)
        if isinstance(fixed, str):
            yield name, fixed
        elif dataclasses.is_dataclass(value):
            for inner, how in _fixed_settings(value, name):
                if fixed is None or inner.removeprefix(f"{name}.") in fixed:
                    yield inner, how


def parse(cls: type[T], values: Mapping[str, Setting], *, path: str = "config") -> T:
    """Turns nested mappings into the frozen dataclass `cls`.

    Args:
      cls: a dataclass whose fields are int, float, bool, str, tuples of these, other such
        dataclasses (one of several by `Choice`), or `X | None`.
      values: mapping from field name to value (a `ConfigDict` or a dict from JSON).
      path: the section's full name, for messages.

    Returns:
      An instance of `cls`.

    Raises:
      ConfigError: an unknown key, a missing key, a wrong type, or a value `cls` rejects.
    """
    _check_section(values, path)
    fields = _fields(cls)
    hints = field_types(typing.cast(Any, cls))
    for key in values:
        if key not in fields:
            raise _unknown_key(key, path, fields)
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


def _parse_choice(choice: Choice, values: Any, path: str) -> Any:
    """The section as the dataclass that its own key names."""
    _check_section(values, path)
    if choice.key not in values:
        raise ConfigError(f"{path}.{choice.key}: missing")
    chosen = values[choice.key]
    try:
        one_of(chosen, choice.key, *choice.options)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
    cls = choice.options[chosen].config
    own = _fields(cls)
    others = {name: option.config for name, option in choice.options.items() if name != chosen}
    for key in [key for key in values if key not in own]:
        owners = {name: other for name, other in others.items() if key in _fields(other)}
        if not owners:
            known = set(own).union(*map(_fields, others.values()))
            raise _unknown_key(key, path, known)
        if not any(_is_default(other, key, values[key]) for other in owners.values()):
            raise ConfigError(
                f"{path}.{key}: {shown(values[key])} has no effect with"
                f" {choice.key} {shown(chosen)}, only with"
                f" {' or '.join(map(repr, owners))}; leave it at its default"
            )
    settings = {key: values[key] for key in values if key in own}
    return parse(typing.cast(type[Any], cls), settings, path=path)


@functools.cache
def field_types(cls: type) -> dict[str, Setting]:
    """The types of a dataclass's fields by name, with what is annotated to them."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_default(cls: type, key: str, value: Any) -> bool:
    field = _fields(cls)[key]
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    try:
        return bool(_value(field_types(cls)[key], value, key) == field.default)
    except ConfigError:
        return False


def _check_section(values: Any, path: str) -> None:
    if not isinstance(values, Mapping) and not hasattr(values, "keys"):
        raise ConfigError(f"{path}: expected a section with keys, got {shown(values)}")


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _unknown_key(key: str, path: str, known: Iterable[str]) -> ConfigError:
    name = shown(key).strip("'") if isinstance(key, str) else shown(key)  # on one line
    return ConfigError(
        f"{path}.{name}: unknown key; the keys of {path} are: {', '.join(sorted(known))}"
    )


def _value(hint: Any, value: Any, name: str) -> Any:
    """Checks one value against a type hint; ints pass as floats, lists as tuples."""
    if hasattr(hint, "__metadata__"):  # Annotated[...]
        for extra in hint.__metadata__:
            if isinstance(extra, Choice):
                return _parse_choice(extra, value, name)
        return _value(hint.__origin__, value, name)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
        return _value(hint, value, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, path=name)
    if origin is tuple:
        item, *_ = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {shown(value)}")
        return tuple(_value(item, part, f"{name}[{i}]") for i, part in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name}: {shown(value)} is too large") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{name}: expected {hint.__name__}, got {shown(value)} ({type(value).__name__})"
        )
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name}: must be finite, got {shown(value)}")
    return value


def to_dict(config: ConfigDataclass) -> JsonObject:
    """The dataclass as plain nested dicts and lists that `parse` and JSON take."""
    plain = dataclasses.asdict(config)

    def listify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listify(item) for key, item in value.items()}
        return [listify(item) for item in value] if isinstance(value, tuple) else value

    return {key: listify(value) for key, value in plain.items()}


def one_of(value: str, name: str, *options: str) -> None:
    """Raises `ConfigError` unless `value` is among `options`."""
    known = isinstance(value, str) and value in options
    check(known, name, f"must be one of {', '.join(options)}; got {shown(value)}")
