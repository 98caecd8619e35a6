"""Strict comparison of names and shapes: the report of a conversion, and its one error."""

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping

from absl import logging

from beit_jax.config import ConfigError

# Of a message. Names of tensors are listed in it, however many there are and whatever is in them.
_LONGEST = 4000


class WeightsError(ConfigError):
    """A file of weights is damaged, dangerous or does not fit. The message is one line.

    What comes from the file may hold line breaks or steer a terminal, so that whatever can't be
    printed is written as Python would in a text.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        if not text.isprintable():
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        super().__init__(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every name in a conversion.

    Attributes:
      used: names that were converted.
      missing: needed, not found, and allowed to be missing.
      unused: found, not needed, and allowed to be left over.
      rebuilt: index buffers, which are computed and not read.
      left_out: found, of no use to this kind of model, and commonly kept by files of it; not
        converted.
      reshaped: descriptions of changed shapes: "name (732, 12) → (2212, 12)".
      cast: names stored in another precision than float32.
      guessed: facts that the file does not say, each with what was taken for it and why.
      notes: lines about what was chosen.
    """

    used: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for name in ("used", "missing", "unused", "left_out", "rebuilt", "reshaped", "cast"):
            values = getattr(self, name)
            if name in ("left_out", "rebuilt", "cast") and not values:
                continue
            lines.append(f"{name.replace('_', ' ')} ({len(values)}): {compact(values) or 'none'}")
        lines += [f"guessed: {text}" for text in self.guessed]
        return "\n".join([*lines, *self.notes])


def log_remarks(report: Report, *, source: str) -> None:
    """Warns of what was guessed and chosen, where no report is printed."""
    for line in (*(f"guessed {guess}" for guess in report.guessed), *report.notes):
        logging.warning("%s: %s", source, line)


def compact(names: Iterable[str]) -> str:
    """Joins names by commas, those that differ only in the block's number as one."""
    counts = collections.Counter(
        re.sub(r"\b(\w*(?:blocks|layers?))\.\d+\.", r"\1.*.", n) for n in names
    )
    return ", ".join(f"{n} (×{count})" if count > 1 else n for n, count in counts.items())


def allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names `name`, a module that holds it ("lm_head"), or matches as a glob."""
    return any(
        name == pattern
        or name.startswith((f"{pattern}/", f"{pattern}."))
        or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def check_names(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
    fixed: Callable[[str], bool] = lambda name: False,
    hint: str = "",
) -> tuple[list[str], list[str]]:
    """Compares names and shapes and puts every difference into one error.

    Args:
      wanted: names and shapes that are needed.
      found: names and shapes that the source has.
      source: for the message.
      allow_missing: names or patterns that may be missing.
      allow_unused: names or patterns that may be left over.
      fixed: whether a name can't be allowed to be missing or left over.
      hint: the end of the message, where something in it can be allowed.

    Returns:
      The missing and the unused names, all of them allowed.

    Raises:
      WeightsError: others are missing or unused, or shapes differ.
    """
    missing = [name for name in wanted if name not in found]
    unused = [name for name in found if name not in wanted]
    allow_missing, allow_unused = tuple(allow_missing), tuple(allow_unused)
    bad_missing = [n for n in missing if fixed(n) or not allowed(n, allow_missing)]
    bad_unused = [n for n in unused if fixed(n) or not allowed(n, allow_unused)]
    different = [
        f"{name} is {tuple(found[name])}, needed {tuple(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    problems = []
    if bad_missing:
        problems.append(f"missing {compact(bad_missing)}")
    if bad_unused:
        problems.append(f"unused {compact(bad_unused)}")
    if different:
        problems.append(compact(different))
    if problems:
        names = (*bad_missing, *bad_unused)
        if not names or any(fixed(name) for name in names):
            hint = ""  # nothing here can be allowed, or it is another architecture all the same
        raise WeightsError(f"{source} does not fit: {'; '.join(problems)}{hint}")
    return missing, unused
