"""Installed packages against the ranges that this version was tested with."""

import importlib.metadata
import pathlib
import platform
import re
import sys
from collections.abc import Iterable

from packaging.requirements import Requirement

from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, skipped, wrong

_NAME = "beit-jax"
_PYTHON = (3, 11)  # pyproject.toml's requires-python
_FILES = ("library.txt", "train.txt")
_BEFORE_BOUNDS = re.compile(r"^[\w.-]+\s*(\[[^\]]*\])?")


def check_versions(context: Context) -> list[Finding]:
    """Python and every package that training needs."""
    del context
    findings = []
    if sys.version_info[:2] < _PYTHON:
        findings.append(
            wrong(
                f"Python {platform.python_version()} is older than {'.'.join(map(str, _PYTHON))}",
                "make the environment with a newer Python",
            )
        )
    lines = requirements()
    if not lines:
        return [*findings, skipped("the ranges of versions are not recorded in this installation")]
    outside = misfits(lines)
    findings += [
        wrong(
            f"{name} {found or 'is not installed'}{', not ' + bounds if found else ''}",
            f"pip install '{name}{bounds}'",
        )
        for name, found, bounds in outside
    ]
    if not findings:
        findings.append(ok(f"Python {platform.python_version()}, {len(lines)} packages in range"))
    return findings


def requirements() -> list[str]:
    """The lines of the requirements that hold here: a checkout's files, or the wheel's own."""
    folder = pathlib.Path(__file__).parents[2] / "requirements"
    lines: list[str] = []
    if all((folder / name).is_file() for name in _FILES):
        for name in _FILES:
            lines += (folder / name).read_text().splitlines()
    else:
        try:
            lines = importlib.metadata.requires(_NAME) or []
        except importlib.metadata.PackageNotFoundError:
            return []
    lines = [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]
    return [line for line in lines if line and _holds(line)]


def misfits(lines: Iterable[str]) -> list[tuple[str, str, str]]:
    """Packages that are missing or of a version out of range.

    Args:
      lines: requirements: "jax>=0.10.2,<0.12".

    Returns:
      For each the name, the installed version ("" for none) and the bounds.
    """
    found = []
    for line in lines:
        requirement = Requirement(line)
        name = requirement.name
        # As they are written: the specifier would sort them.
        bounds = _BEFORE_BOUNDS.sub("", line.partition(";")[0]).strip()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "", bounds))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append((name, version, bounds))
    return found


def _holds(line: str) -> bool:
    """Whether a requirement's marker is true here; of the extras only [train] counts."""
    marker = Requirement(line).marker
    return marker is None or marker.evaluate({"extra": "train"})
