"""The checkpoint bench, at a size that takes no time."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "bench"


@pytest.mark.slow
def test_it_measures_what_it_saves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("checkpoint_bench", FOLDER / "checkpoint.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "VOCABULARY", 16)
    row = bench.measure((1, 8, 2), repeats=2, folder=str(tmp_path))
    # Parameters, two moments, and a few counters.
    assert 12 * row["parameters"] < row["bytes"] < 12 * row["parameters"] + 64
    assert len(row["each"]["restore"]) == 2
    assert min(row["save"], row["background"], row["restore"]) > 0
    assert len(row["each"]["save_digests"]) == len(row["each"]["restore_digests"]) == 2
    assert 0 < row["save_digests"] < row["save"]
    assert 0 < row["restore_digests"] < row["restore"]
    assert row["restored_gb_per_second"] == pytest.approx(row["bytes"] / 1e9 / row["restore"])
    assert not list(tmp_path.iterdir())
