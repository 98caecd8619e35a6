"""What differs between settings: of a run and its checkpoints, of many hosts, of a cache."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from beit_jax.types import Json

K = TypeVar("K")


class _Absent:
    """Stands for a value where a setting is missing."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def differences(settings: Mapping[K, Mapping[str, Json]]) -> dict[str, dict[K, Json]]:
    """Settings that are not the same everywhere.

        differences({"was": old, "now": new})  # {"model.width": {"was": 4, "now": 6}}

    Args:
      settings: nested dicts, by where they come from.

    Returns:
      Full name, sorted → each side's value, `ABSENT` where it has none.
    """
    flat = {side: dict(_flatten(nested)) for side, nested in settings.items()}
    names = sorted({name for values in flat.values() for name in values})
    result = {}
    for name in names:
        sides = {side: values.get(name, ABSENT) for side, values in flat.items()}
        first, *others = sides.values()
        if any(value != first for value in others):
            result[name] = sides
    return result


def _flatten(nested: Mapping[str, Json], path: str = "") -> Iterator[tuple[str, Json]]:
    for key, value in nested.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _flatten(value, name)
        else:
            yield name, value
