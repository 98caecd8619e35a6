"""Memory is measured for a process and what it starts, and growth is found out."""

import subprocess
import sys

import pytest

from tests.faults import memory

HUNGRY = """
import sys
more = bytearray(int(sys.argv[1])); more[::4096] = b"x" * len(more[::4096])
print("ready", flush=True); input()
"""


def taken(size: int) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", HUNGRY, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        return memory.memory_of(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_a_processs_memory_is_seen():
    assert taken(50_000_000) - taken(0) == pytest.approx(50_000_000, rel=0.1)


def test_memory_of_children_counts():
    program = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '50000000'])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, HUNGRY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout.readline() == "ready\n"
        assert memory.memory_of(parent.pid) > 50_000_000
    finally:
        parent.communicate("\n")


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        ([100] * 30, ""),
        (list(range(1000, 1030)), ""),
        ([50] * 10 + [100] * 20, ""),
        (list(range(100, 200)), "grows"),
        ([1, 2], "only 2 samples"),
    ],
)
def test_growth_is_found_out(samples, error):
    assert memory.growth([1_000_000 * sample for sample in samples]).startswith(error)
    assert bool(memory.growth(samples)) == bool(error)


@pytest.mark.slow
def test_a_run_is_watched(tmp_path):
    measured = memory.watch(tmp_path, seconds=10, seed=0, settling=1)
    assert len(measured) >= 5
    assert min(measured) > 100_000_000
