"""Faults of hosts end as promised, and an end that is not as promised is noticed."""

import numpy as np
import pytest

from tests.faults import hosts

pytestmark = pytest.mark.slow
KINDS = ("paused", "other clock")  # that no other test makes


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """What the kinds gave, and the folder, in which is the run without a fault."""
    folder = tmp_path_factory.mktemp("hosts")
    return hosts.soak(count=len(KINDS), seed=0, folder=folder, kinds=KINDS), folder


def test_a_fault_of_the_kinds_that_no_other_test_makes(soaked):
    row, _ = soaked
    assert row.failures == ()
    assert row.survived == row.tried == len(KINDS)


def test_another_end_than_the_promised_one_is_a_failure(soaked, tmp_path, monkeypatch):
    def goes_on(run, random):
        with run.processes() as started:
            hosts._expect(started, {0: 69, 1: 69}, names="lost process")

    monkeypatch.setitem(hosts.FAULTS, "killed", goes_on)
    error = hosts._try("killed", soaked[1] / "straight", tmp_path / "run", np.random.default_rng(0))
    assert error.startswith("exit codes {0: 0, 1: 0} instead of {0: 69, 1: 69}")
