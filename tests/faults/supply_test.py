"""An environment that can't be made, or whose tests fail, is a failure with a reason."""

import subprocess

import pytest

from tests.faults import supply


@pytest.fixture
def steps(monkeypatch):
    """What would be run; the first step whose words hold `fails` ends with 1."""
    taken = []

    def run(step, **_):
        taken.append(step)
        failed = run.fails and run.fails in " ".join(step)
        return subprocess.CompletedProcess(step, int(bool(failed)), "one\ntwo failed\n", "")

    run.fails, run.taken = "", taken
    monkeypatch.setattr(supply.subprocess, "run", run)
    return run


def test_both_environments_are_installed_and_tested(steps, tmp_path):
    row = supply.soak(count=2, seed=0, folder=tmp_path)
    assert (row.tried, row.survived, row.failures) == (2, 2, ())
    commands = [" ".join(step) for step in steps.taken]
    assert sum("-m venv" in command for command in commands) == 2
    assert sum("-m pytest" in command for command in commands) == 2
    assert sum("--require-hashes" in command for command in commands) == 1
    assert "jax==0.10.2" in (tmp_path / "lowest.txt").read_text()


def test_a_failure_is_named(steps, tmp_path):
    steps.fails = "-m pytest"
    row = supply.soak(count=1, seed=0, folder=tmp_path)
    assert (row.tried, row.survived) == (1, 0)
    assert row.failures[0].startswith("lowest: ")
    assert row.failures[0].endswith("ended with 1: one | two failed")


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (0, "No known vulnerabilities found", ""),
        (0, "No known vulnerabilities found\nName Skip Reason", None),  # the index is not PyPI
        (1, "/usr/bin/python: No module named pip_audit", None),
        (1, "Found 1 known vulnerability in 1 package", "pillow 11.0 PYSEC-1"),
    ],
)
def test_an_audit_says_yes_no_or_nothing(monkeypatch, code, said, expected):
    table = "Name Version ID\n---- ------- --\npillow 11.0 PYSEC-1\n"
    done = subprocess.CompletedProcess([], code, table if "Found" in said else "", said + "\n")
    monkeypatch.setattr(supply.subprocess, "run", lambda *arguments, **options: done)
    assert supply.audit() == expected
