"""The lowest versions that are allowed, and the locked ones: installed, and tested.

Each environment is made by pip from an index, and takes 3 GB on disk and some minutes. What makes
it fail is a version range that promises too much, or a release that has been withdrawn. Third, the
locked versions are looked up among known vulnerabilities, where pip-audit is installed and reaches
its database.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.faults.row import Row

ROOT = Path(__file__).parent.parent.parent
FILES = [
    ROOT / name for name in ("requirements.txt", "requirements/hub.txt", "requirements/parquet.txt")
]
# Tests of everything that imports another package; those of peers skip themselves.
TESTS = ("tests/config", "tests/data", "tests/models", "tests/tasks", "tests/training")
TOOLS = ("pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.150,<7", "scipy>=1.14")


def requirements(files: Sequence[Path] = FILES) -> list[Requirement]:
    """The requirements of these files and of those that they include."""
    found = []
    for file in files:
        for line in file.read_text().splitlines():
            text = line.split("#")[0].strip()
            if text.startswith("-r "):
                found += requirements([file.parent / text[3:].strip()])
            elif text:
                found.append(Requirement(text))
    return found


def lowest(wanted: Sequence[Requirement]) -> list[str]:
    """Constraints for the lowest version of each of these that is for this machine."""
    lines = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate():
            continue
        bounds = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
        lines += [f"{requirement.name}=={version}" for version in bounds]
    return lines


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Installs and tests up to two environments, the lowest versions first; then asks pip-audit.

    Args:
      count: of these three.
      seed: not used: versions are not drawn.
      folder: where the environments are made.
    """
    del seed
    constraints = folder / "lowest.txt"
    constraints.write_text("\n".join(lowest(requirements())) + "\n")
    files = [part for file in FILES for part in ("-r", str(file))]
    installs = {
        "lowest": [*files, "-c", str(constraints)],
        "locked": ["--require-hashes", "-r", str(ROOT / "requirements" / "lock.txt")],
    }
    failures = []
    chosen = list(installs)[:count]
    for name in chosen:
        error = _try(folder / name, installs[name])
        failures += [f"{name}: {error}"] if error else []
    tried, note = len(chosen), f"environments with the {' and the '.join(chosen)} versions"
    if count > len(installs):
        vulnerable = audit()
        if vulnerable is None:
            note += (
                "; known vulnerabilities were not asked for: pip-audit or its database is missing"
            )
        else:
            tried += 1
            failures += [f"vulnerable: {vulnerable}"] if vulnerable else []
            note += "; known vulnerabilities were asked for"
    return Row(
        part="supply",
        tried=tried,
        survived=tried - len(failures),
        failures=tuple(failures),
        note=note,
    )


def audit() -> str | None:
    """Known vulnerabilities of the locked versions, "" for none; None where nobody can say."""
    lock = str(ROOT / "requirements" / "lock.txt")
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "-r", lock, "-f", "columns"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode == 0:  # also where every package was skipped, as on an index without them
        return "" if "No known vulnerabilities" in said and "Skip Reason" not in said else None
    return " | ".join(done.stdout.splitlines()[2:]) if "Found" in done.stderr else None


def _try(environment: Path, install: list[str]) -> str:
    """Makes an environment and runs the tests in it; says what went wrong."""
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    tests = [python, "-m", "pytest", "-n", "2", "-m", "not slow", *TESTS]
    steps = [[sys.executable, "-m", "venv", str(environment)], [*pip, *install], [*pip, *TOOLS]]
    for step in [*steps, tests]:
        done = subprocess.run(
            step, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
        )
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return f"{' '.join(step[:5])} ended with {done.returncode}: {' | '.join(lines[-3:])}"
    return ""
