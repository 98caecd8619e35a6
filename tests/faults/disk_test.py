"""A disk that becomes full, forbidden or limited ends a run or a command as promised."""

import pytest

from tests.faults import disk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not disk.can_mount(), reason="needs a file system of its own"),
]
RUNS = (("pretrain", "save", "full", 60_000),)  # bench/soak.py makes the others


def test_runs(tmp_path):
    names = ("job", "moment", "kind", "left")
    row = disk.try_all([dict(zip(names, run, strict=True)) for run in RUNS], folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == len(RUNS)


def test_commands(tmp_path):
    cases = [{"command": name, "kind": "full", "left": 9_000} for name in ("export timm", "import")]
    cases[0]["kind"] = "read-only"
    row = disk.try_all(cases, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == len(cases)


def test_an_end_that_was_not_promised_is_a_failure():
    line = "error: /disk/run: the disk is full; the same command continues"
    for code, said in ((1, line), (74, f"Traceback\n{line}"), (74, f"{line}\n{line}"), (74, "")):
        with pytest.raises(AssertionError):
            disk._check_end(code, said, disk=disk.Path("/disk"))
    disk._check_end(74, line, disk=disk.Path("/disk"))
