"""What is installed can be repeated, and the lowest versions that are allowed are named."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.faults import supply

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
ENVIRONMENTS = [
    {"python_version": python, "python_full_version": f"{python}.7", "platform_machine": machine}
    for python in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def locked(environment) -> dict[str, str]:
    """Name → version of what the lock file installs there."""
    found = {}
    for line in LOCK.read_text().splitlines():
        if re.match(r"[a-z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            (exact,) = requirement.specifier
            assert exact.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = exact.version
    return found


@pytest.mark.parametrize("changes", ENVIRONMENTS, ids=lambda e: "-".join(list(e.values())[::2]))
def test_the_lock_file_has_what_is_required_on_every_machine(changes):
    environment = default_environment() | {"sys_platform": "linux"} | changes
    versions = locked(environment)
    for requirement in supply.requirements():
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {LOCK.name}: write it again"
        assert version in requirement.specifier, f"{requirement}, but {LOCK.name} has {version}"


def test_every_line_of_the_lock_file_has_a_hash():
    entries = re.split(r"\n(?=[a-z0-9])", LOCK.read_text())[1:]
    assert len(entries) > 50
    for entry in entries:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_every_requirement_has_a_lowest_version():
    for requirement in supply.requirements():
        assert any(one.operator in (">=", "==") for one in requirement.specifier), str(requirement)


def test_the_lowest_versions_are_those_of_the_ranges(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "-r more.txt\nabc>=1.5,<2 # why\nonly>=3; python_version < '3'\n"
    )
    (tmp_path / "more.txt").write_text("# a comment\nDef[extra]>=0.1\n")
    found = supply.requirements([tmp_path / "requirements.txt"])
    assert [str(requirement.name) for requirement in found] == ["Def", "abc", "only"]
    assert supply.lowest(found) == ["Def==0.1", "abc==1.5"]
