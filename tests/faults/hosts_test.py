"""Faults of hosts end as promised, and an end that is not as promised is noticed."""

import numpy as np
import pytest

from tests.distributed.processes import finish
from tests.faults import hosts

pytestmark = pytest.mark.slow


def test_a_fault_of_the_kinds_that_no_other_test_makes(tmp_path):
    kinds = ("paused", "other clock")
    row = hosts.soak(count=len(kinds), seed=0, folder=tmp_path, kinds=kinds)
    assert row.failures == ()
    assert row.survived == row.tried == len(kinds)


def test_another_end_than_the_promised_one_is_a_failure(tmp_path, monkeypatch):
    def goes_on(run, random):
        with run.processes() as started:
            hosts._expect(started, {0: 69, 1: 69}, names="lost process")

    monkeypatch.setitem(hosts.FAULTS, "killed", goes_on)
    finish(tmp_path / "straight", hosts.CONFIG, count=2)
    error = hosts._try("killed", tmp_path / "straight", tmp_path / "run", np.random.default_rng(0))
    assert error.startswith("exit codes {0: 0, 1: 0} instead of {0: 69, 1: 69}")
