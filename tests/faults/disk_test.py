"""A disk that becomes full, forbidden or limited ends a run or a command as promised."""

import pytest

from tests.faults import disk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not disk.can_mount(), reason="needs a file system of its own"),
]
CASES = (  # bench/soak.py makes the others
    {"job": "pretrain", "moment": "save", "kind": "full", "left": 60_000},
    {"command": "export timm", "kind": "read-only", "left": 9_000},
    {"command": "import", "kind": "full", "left": 9_000},
)


def test_a_run_and_commands(tmp_path):
    """In one process: the commands read the run that the other run is compared with."""
    row = disk.try_all([*CASES], folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == len(CASES)


def test_an_end_that_was_not_promised_is_a_failure():
    line = "error: /disk/run: the disk is full; the same command continues"
    for code, said in ((1, line), (74, f"Traceback\n{line}"), (74, f"{line}\n{line}"), (74, "")):
        with pytest.raises(AssertionError):
            disk._check_end(code, said, disk=disk.Path("/disk"))
    disk._check_end(74, line, disk=disk.Path("/disk"))
