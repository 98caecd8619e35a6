"""Settings that a job does not use: refused where they ask for something, not ignored.

Jobs share config sections, so a section may hold settings that one of its jobs has no use for. The
job's config class names them:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ClassifyConfig:
        UNUSED = {"run.picture_every": Unused("classification draws no pictures")}
        run: RunConfig

Config files set such keys too, since every key must be there to be overridden; so their default is
accepted. Any other value is a ConfigError with the key's full name.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

from beit_jax.config.parse import ConfigError, shown
from beit_jax.types import Json


@dataclasses.dataclass(frozen=True)
class Unused:
    """Why a setting, or every setting of a section, is not used.

    Attributes:
      reason: for the message.
      accepted: values (of a section: instances of its class) that are accepted beside the default,
        because published recipes have them.
    """

    reason: str
    accepted: tuple[Json, ...] = ()


@runtime_checkable
class NamesUnused(Protocol):
    """A config class that names settings it does not use, by their path from there."""

    UNUSED: ClassVar[dict[str, Unused]]


def check_unused(config: Json, *, path: str = "config") -> None:
    """Refuses settings that the job, or a job inside it, does not use.

    Args:
      config: a frozen config dataclass; its sections are checked too.
      path: the section's full name, for messages.

    Raises:
      ConfigError: a setting that is not used has neither its default nor an accepted value.
    """
    if isinstance(config, NamesUnused):
        for name, unused in config.UNUSED.items():
            for leaf, value, accepted in _leaves(config, name, unused.accepted):
                if value not in accepted:
                    raise ConfigError(
                        f"{path}.{leaf}: {shown(value)} would have no effect: {unused.reason};"
                        f" leave it at {shown(accepted[0])}"
                    )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_unused(value, path=f"{path}.{field.name}")


def _leaves(
    config: Json, name: str, accepted: tuple[Json, ...]
) -> Iterator[tuple[str, Json, list[Json]]]:
    """Name, value and accepted values (the default first) of a setting or of a whole section."""
    *sections, last = name.split(".")
    for section in sections:
        config = getattr(config, section)
    (field,) = [field for field in dataclasses.fields(config) if field.name == last]
    value = getattr(config, last)
    if dataclasses.is_dataclass(value):
        for inner in dataclasses.fields(value):
            others = tuple(getattr(section, inner.name) for section in accepted)
            for leaf, found, allowed in _leaves(value, inner.name, others):
                yield f"{name}.{leaf}", found, allowed
        return
    default = [] if field.default is dataclasses.MISSING else [field.default]
    yield name, value, [*default, *accepted]
