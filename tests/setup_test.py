"""launch/setup.sh installs a requirements file once, and again when what it asks for changes."""

import pathlib
import shutil
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python writes down what pip was told to install."""
    for name in ("launch/setup.sh", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor last; do :; done\necho "$last" >>installed\n')
    python.chmod(0o755)
    return tmp_path


def installed(checkout) -> list[str]:
    """Sets the environment up and returns what was installed for that."""
    script = (
        "set -euo pipefail; PYTHON=unused; source launch/setup.sh;"
        ' setup_environment requirements.txt "--no-deps tests/requirements.txt"'
    )
    subprocess.run(["bash", "-c", script], cwd=checkout, check=True, capture_output=True)
    log = checkout / "installed"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_requirements_are_installed_once_and_again_when_they_change(checkout):
    assert installed(checkout) == ["requirements.txt", "tests/requirements.txt"]
    assert installed(checkout) == []
    with (checkout / "requirements" / "train.txt").open("a") as file:  # included with -r
        file.write("another\n")
    assert installed(checkout) == ["requirements.txt"]
    with (checkout / "tests" / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert installed(checkout) == ["tests/requirements.txt"]
    assert installed(checkout) == []


def test_requirements_that_could_not_be_installed_are_tried_again(checkout):
    python = checkout / ".venv" / "bin" / "python"
    working = python.read_text()
    python.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        installed(checkout)
    python.write_text(working)
    assert installed(checkout) == ["requirements.txt", "tests/requirements.txt"]


def test_the_requirements_of_the_tests_hold_all_that_the_extra_dev_does():
    """tests/run.sh and `pip install -e .[dev]` make the same environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    script = (ROOT / "tests" / "run.sh").read_text()
    for file in set(extras["dev"]["file"]) - {"requirements/train.txt"}:
        assert file in script
    included = [
        line.removeprefix("-r ")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("-r ")
    ]
    dependencies = project["tool"]["setuptools"]["dynamic"]["dependencies"]
    assert included == [*dependencies["file"], *extras["train"]["file"]]
