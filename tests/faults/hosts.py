"""Hosts that are late, missing, dead, stopped, of another opinion, or with another time.

Each fault happens to one of the processes of a small run on this machine. It is survived if the run
ends as promised: with the same result where it may go on; else within the time that is set, on
every host, with one line that names the host, and the same command then gives the result of a run
without a fault, bit for bit.
"""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.distributed.processes import Run, assert_same_state, finish, losses, values
from tests.faults.row import Row

HEARTBEAT = 8.0  # seconds until a silent host counts as lost
STEP_SECONDS = 0.1
# Time-based saves, so that clocks matter.
CONFIG = values(run__checkpoint_every=3, run__checkpoint_minutes=0.01)


def _late(run: "Faulty", random: np.random.Generator) -> None:
    with run.processes(only=[0]) as started:
        time.sleep(float(random.uniform(0.5, 6)))
        started.start(1)
        _expect(started, {0: 0, 1: 0})


def _missing(run: "Faulty", random: np.random.Generator) -> None:
    absent = int(random.integers(2))
    with run.processes(only=[1 - absent], start_timeout=4.0) as started:
        _expect(started, {1 - absent: 69}, names=f"process {absent}")


def _killed(run: "Faulty", random: np.random.Generator) -> None:
    victim = int(random.integers(2))
    with run.processes() as started:
        _wait_a_little(started, random)
        started.processes[victim].kill()
        _expect(started, {victim: -9, 1 - victim: 69}, names=f"lost process {victim} (")


def _stopped(run: "Faulty", random: np.random.Generator) -> None:
    """For longer than a host may be silent."""
    victim = int(random.integers(2))
    with run.processes() as started:
        _wait_a_little(started, random)
        started.processes[victim].send_signal(signal.SIGSTOP)
        try:
            code = started.processes[1 - victim].wait(90)
        finally:
            started.processes[victim].kill()
        _check(code == 69, f"exit code {code} beside a stopped process", started)
        _check(f"process {victim} (" in started.output(1 - victim), "no host named", started)


def _paused(run: "Faulty", random: np.random.Generator) -> None:
    """For less time than a host may be silent."""
    victim = int(random.integers(2))
    with run.processes() as started:
        _wait_a_little(started, random)
        started.processes[victim].send_signal(signal.SIGSTOP)
        time.sleep(float(random.uniform(0.2, HEARTBEAT / 3)))
        started.processes[victim].send_signal(signal.SIGCONT)
        _expect(started, {0: 0, 1: 0})


def _told_to_stop(run: "Faulty", random: np.random.Generator) -> None:
    victim = int(random.integers(2))
    with run.processes() as started:
        _wait_a_little(started, random)
        started.processes[victim].send_signal(signal.SIGTERM)
        _expect(started, {0: 75, 1: 75})


def _other_config(run: "Faulty", random: np.random.Generator) -> None:
    seed = int(random.integers(1, 1000))
    with run.processes(
        change=lambda index: {**CONFIG, "run": {**CONFIG["run"], "seed": index * seed}}
    ) as started:
        _expect(started, {0: 2, 1: 2}, names="config.run.seed: 0 on process 0 (")


def _other_clock(run: "Faulty", random: np.random.Generator) -> None:
    ahead = float(random.uniform(-3600, 86400))
    with run.processes(clocks={int(random.integers(2)): ahead}) as started:
        _expect(started, {0: 0, 1: 0})


FAULTS: dict[str, Callable[["Faulty", np.random.Generator], None]] = {
    "killed": _killed,
    "told to stop": _told_to_stop,
    "stopped": _stopped,
    "paused": _paused,
    "late": _late,
    "missing": _missing,
    "other config": _other_config,
    "other clock": _other_clock,
}


class NotSurvivedError(Exception):
    """A run did not end as promised; the message says how."""


class Faulty:
    """A run of two processes in a directory of its own, to which a fault happens."""

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def processes(self, **changes) -> Run:
        """Starts them, slowly enough to be met in the middle of a step."""
        config = CONFIG | {"step_seconds": STEP_SECONDS}
        settings = {"count": 2, "heartbeat_timeout": HEARTBEAT} | changes
        return Run(self.workdir, config, **settings)


def soak(*, count: int, seed: int, folder: Path, kinds: tuple[str, ...] = tuple(FAULTS)) -> Row:
    """Makes `count` faults, of each kind in turn, at moments that are drawn."""
    straight = folder / "straight"
    finish(straight, CONFIG, count=2)
    failures = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        error = _try(kind, straight, folder / str(number), np.random.default_rng([seed, number]))
        failures += [f"seed {seed}, fault {number}, {kind}: {error}"] if error else []
    return Row(
        part="hosts",
        tried=count,
        survived=count - len(failures),
        failures=tuple(failures),
        note=", ".join(kinds[:count]),
    )


def _try(kind: str, straight: Path, workdir: Path, random: np.random.Generator) -> str:
    """Makes a fault and then continues the run; says what was not as promised."""
    try:
        FAULTS[kind](Faulty(workdir), random)
        finish(workdir, CONFIG, count=2)
        _check_equal(workdir, straight)
    except (NotSurvivedError, AssertionError) as error:
        return " | ".join(str(error).splitlines()[:20])
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return ""


def _check_equal(workdir: Path, straight: Path) -> None:
    assert losses(workdir) == losses(straight), "metrics.jsonl differs"
    assert_same_state(workdir, straight)


def _wait_a_little(started: Run, random: np.random.Generator) -> None:
    """Until some step, and a part of one."""
    started.wait_for_text(f"step {int(random.integers(1, 15)):>2}/20")
    time.sleep(float(random.uniform(0, 2 * STEP_SECONDS)))


def _expect(started: Run, codes: dict[int, int], *, names: str = "") -> None:
    """Waits for the end; where a name is wanted, each process left must say it in one line."""
    found = started.wait(timeout=120)
    _check(found == codes, f"exit codes {found} instead of {codes}", started)
    for index, code in codes.items():
        if names and code > 0:
            errors = started.errors(index)
            one_line = len(errors) == 1 and names in errors[0]
            _check(one_line, f"process {index} says {errors}, not {names!r}", started)
        _check("Traceback" not in started.output(index), "a traceback", started)


def _check(condition: bool, message: str, started: Run) -> None:
    if not condition:
        raise NotSurvivedError(f"{message}: {started.everything()[-2000:]}")
