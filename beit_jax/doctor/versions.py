"""Installed packages against the ranges that this version was tested with."""

import importlib.metadata
import pathlib
import platform
import re
import sys
from collections.abc import Iterable, Sequence

from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, skipped, wrong

_NAME = "beit-jax"
_PYTHON = (3, 11)  # pyproject.toml's requires-python
_FILES = ("library.txt", "train.txt")
_LINE = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;(.*))?")
_BOUND = re.compile(r"(>=|<=|==|!=|<|>)\s*([\w.]+)")
_MARKER = re.compile(r"(\w+)\s*(>=|<=|==|!=|<|>)\s*['\"]([^'\"]*)['\"]")


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
        match = _LINE.match(line)
        if match is None:
            continue
        name, bounds = match[1], match[2].strip().strip("()")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "", bounds))
            continue
        if not all(_compare(version, *bound) for bound in _BOUND.findall(bounds)):
            found.append((name, version, bounds))
    return found


def _holds(line: str) -> bool:
    """Whether a requirement's marker is true here; of the extras only [train] counts."""
    here = {
        "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "platform_machine": platform.machine(),
        "sys_platform": sys.platform,
        "extra": "train",
    }
    match = _LINE.match(line)
    markers = _MARKER.findall((match and match[3]) or "")
    return all(
        _compare(here[name], operator, value)
        if name == "python_version"
        else (here.get(name) == value) == (operator == "==")
        for name, operator, value in markers
    )


def _compare(version: str, operator: str, bound: str) -> bool:
    one, other = _numbers(version), _numbers(bound)
    length = max(len(one), len(other))
    a = [*one, *[0] * (length - len(one))]
    b = [*other, *[0] * (length - len(other))]
    return {
        ">=": a >= b,
        "<=": a <= b,
        "==": a == b,
        "!=": a != b,
        "<": a < b,
        ">": a > b,
    }[operator]


def _numbers(version: str) -> Sequence[int]:
    """The release of a version: (2, 21, 0) of "2.21.0rc1+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)
