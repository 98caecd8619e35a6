"""bench/online.py compares whole periods, the first left out, and adds up what comes between."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"


def test_times_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_online", BENCH / "online.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_online", bench)
    spec.loader.exec_module(bench)
    # Steps of 1 s; an evaluation of 3 s and a picture of 1 s every 10 steps, at first 9 s longer.
    spans = [(10, 10, 22), (10, 22, 23), (20, 33, 36), (20, 36, 37), (30, 47, 50), (30, 50, 51)]
    found = bench.times([*spans, (31, 52, 60)], every=10, steps=30)
    assert found["step_seconds"] == pytest.approx(28 / 20)
    assert found["extra_seconds"] == pytest.approx(4)
    assert found["share"] == pytest.approx(8 / 20)
