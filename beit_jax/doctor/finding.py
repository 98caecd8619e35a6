"""What a check says."""

import dataclasses
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "skipped", "warning", "wrong"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
      level: "ok"; "skipped", where something that was found wrong before stands in the way;
        "warning", what a run survives; "wrong", what ends it or makes it useless.
      what: was found, in one line, with its numbers.
      fix: what to do; "" where there is nothing to do.
    """

    level: Level
    what: str
    fix: str = ""


class BlockedError(Exception):
    """A check can't be made, because what it looks at failed in an earlier one, which said so."""


def ok(what: str) -> Finding:
    """A finding that all is well."""
    return Finding(level="ok", what=what)


def skipped(what: str) -> Finding:
    """A finding that something was not looked at, and why."""
    return Finding(level="skipped", what=what)


def warning(what: str, fix: str) -> Finding:
    """A finding that a run survives."""
    return Finding(level="warning", what=what, fix=fix)


def wrong(what: str, fix: str) -> Finding:
    """A finding that ends a run or makes it useless."""
    return Finding(level="wrong", what=what, fix=fix)
