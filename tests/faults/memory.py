"""Memory of a run over time: flat, with everything that a run does between steps.

A real `main.py` pre-trains on a folder of images, some of them damaged, and logs, evaluates, draws
and saves every few steps. Memory is that of its process and of all that it starts.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.faults import data
from tests.faults.row import Row

ROOT = Path(__file__).parent.parent.parent
IMAGES = 200
FLAT = 0.03  # the share by which the last third's median may exceed that of the middle one
SETTLING = 30.0  # seconds for the first steps, evaluations, pictures and checkpoints
SETTINGS = {
    "run.steps": 1_000_000,
    "run.eval_every": 200,
    "run.picture_every": 300,
    "run.checkpoint_every": 150,
    "run.log_every": 10,
    "data.max_bad_share": 0.5,
    "data.holdout": 30,
}


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Watches one run for `count` minutes after it has settled."""
    measured = watch(folder, seconds=60.0 * count, seed=seed)
    error = growth(measured)
    peak = max(measured) if measured else 0
    return Row(
        part="memory",
        tried=1,
        survived=int(not error),
        failures=(error,) if error else (),
        note=f"{count} minutes, peak {peak / 1e6:.0f} MB, {trend(measured)}",
    )


def watch(folder: Path, *, seconds: float, seed: int, settling: float = SETTLING) -> list[int]:
    """Runs and samples the memory once a second; then the run is told to stop.

    Args:
      folder: for images and the run.
      seconds: of watching, after `settling`.
      seed: of the images and the run.
      settling: seconds after the first logged step.

    Returns:
      Bytes.

    Raises:
      AssertionError: the run ended by itself, or did not stop as told.
    """
    images = folder / "images"
    images.mkdir()
    for number, (_, content) in zip(range(IMAGES), data.files(seed), strict=False):
        (images / f"{number:04}.jpg").write_bytes(content)
    settings = SETTINGS | {"data.source": f"folder:{images}", "run.seed": seed}
    command = [sys.executable, "main.py", "--config=tests/tasks/tiny.py:pretrain"]
    command += [f"--workdir={folder / 'run'}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "run" / "metrics.jsonl").exists():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        time.sleep(settling)
        measured = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert process.poll() is None, log.read_text()[-2000:]
            measured.append(memory_of(process.pid))
            time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()
    return measured


def memory_of(pid: int) -> int:
    """Bytes in memory of a process and its descendants; shared pages count once."""
    total = 0
    with contextlib.suppress(OSError):  # it may end meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            total += sum(memory_of(int(child)) for child in children)
    return total


def growth(measured: list[int]) -> str:
    """What is wrong with a series of samples; "" where it is flat."""
    if len(measured) < 9:
        return f"only {len(measured)} samples"
    middle, last = _thirds(measured)[1:]
    if last > (1 + FLAT) * middle:
        return f"grows: {trend(measured)}"
    return ""


def trend(measured: list[int]) -> str:
    """The medians of a series' thirds, in words."""
    if len(measured) < 3:
        return "not measured"
    return (
        "medians of thirds " + ", ".join(f"{part / 1e6:.0f}" for part in _thirds(measured)) + " MB"
    )


def _thirds(measured: list[int]) -> list[float]:
    return [statistics.median(part) for part in np.array_split(np.asarray(measured), 3)]
