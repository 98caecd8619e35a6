"""Kills at random moments change nothing, and something that did change would be noticed."""

import json

import numpy as np
import pytest

from tests.faults import kill
from tests.faults.zygote import Zygote


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_that_was_left_alone(tmp_path):
    with Zygote(modules=("beit_jax.jobs", "tests.distributed.worker"), folder=tmp_path) as zygote:
        failures, tried = kill.try_command(
            kill.regression(), zygote, tmp_path / "runs", hits=3, random=np.random.default_rng(0)
        )
        assert failures == []
        assert tried == 3

        straight = tmp_path / "runs/straight"
        log = straight / "metrics.jsonl"
        whole = log.read_text()
        for changed in (
            whole + whole.splitlines()[-1] + "\n",  # doubled
            whole.replace(whole.splitlines()[3] + "\n", ""),  # a hole
            whole.replace('"loss": ', '"loss": 1', 1),
        ):
            other = tmp_path / f"other {len(changed)}"
            other.mkdir()
            (other / "checkpoints").symlink_to(straight / "checkpoints")
            (other / "metrics.jsonl").write_text(changed)
            with pytest.raises(kill.NotSurvivedError, match=r"metrics\.jsonl has"):
                kill.compare(straight, other)
        assert [json.loads(line)["step"] for line in whole.splitlines() if "eval" in line] == [
            *range(4, 25, 4)
        ]


@pytest.mark.slow
def test_pre_training_and_exports_survive(tmp_path):
    """The other kinds, each of which takes a minute, are bench/soak.py's."""
    row = kill.soak(count=2, seed=1, folder=tmp_path, kinds=("pre-training",))
    assert row.failures == ()
    assert row.tried >= 2
