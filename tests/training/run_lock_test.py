"""Two runs in one directory: one is refused by name, and a crash leaves no lock behind."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from beit_jax.config import ConfigError
from beit_jax.training import claims, run_lock

ROOT = Path(__file__).parent.parent.parent
# Holds the directory that it is given, says so, and ends with its standard input. With "child", a
# forked process outlives it, as data workers do.
HOLDER = """
import os, sys, time
from beit_jax.config import ConfigError
from beit_jax.training import run_lock
try:
    with run_lock.hold(sys.argv[1]):
        if sys.argv[2] == "child" and not os.fork():
            time.sleep(60)
            os._exit(0)
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error, flush=True)
"""


def start(folder, mode="alone"):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), mode],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process):
    """Kills a process and what it has forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def network_disk(monkeypatch):
    """Every path counts as one of a file system whose locks can't be trusted."""
    monkeypatch.setattr(run_lock, "_file_system", lambda path: "nfs4")


def test_the_second_run_is_refused_by_the_first_ones_host_and_process(tmp_path):
    first = start(tmp_path)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as refused, run_lock.hold(str(tmp_path)):
            pass
        line = str(refused.value)
        assert line.startswith(f"--workdir: {tmp_path} is in use by process {first.pid} on ")
        assert os.uname().nodename in line
        assert " since 20" in line
        assert len(line.splitlines()) == 1
        first.communicate("")
        assert first.returncode == 0
        with run_lock.hold(str(tmp_path)):
            assert (tmp_path / "run.lock").exists()
        assert list(tmp_path.iterdir()) == []
    finally:
        end(first)


def test_a_killed_run_leaves_no_lock_though_its_children_live(tmp_path):
    first = start(tmp_path, "child")
    try:
        assert first.stdout.readline() == "held\n"
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert os.killpg(first.pid, 0) is None  # the child lives
        with run_lock.hold(str(tmp_path)):
            pass
    finally:
        end(first)


def test_of_two_that_start_at_once_exactly_one_holds(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    try:
        said = sorted(process.stdout.readline() for process in both)
        assert said[1] == "held\n", said
        assert said[0].startswith(f"--workdir: {tmp_path} is in use by process "), said
    finally:
        for process in both:
            end(process)


def hold_in_child(folder, seconds):
    time.sleep(seconds)


def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    with run_lock.hold(str(tmp_path)):
        child = fork.Process(target=hold_in_child, args=(str(tmp_path), 30.0))
        child.start()
        (descriptor,) = run_lock._descriptors
        leaving = os.fork()
        if not leaving:  # unwinds as its parent will, in its copy of everything
            run_lock._release(descriptor, str(tmp_path / "run.lock"))
            os._exit(0)
        os.waitpid(leaving, 0)
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    try:
        assert child.is_alive()
        with run_lock.hold(str(tmp_path)):
            pass
    finally:
        child.kill()
        child.join()


def test_a_job_within_a_job_may_hold_it_again(tmp_path):
    with run_lock.hold(str(tmp_path)):
        with run_lock.hold(f"{tmp_path}/../{tmp_path.name}"):
            pass
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"beit_jax run lock": 1, "pid": 7'])
def test_the_file_of_a_crashed_run_is_no_lock(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with run_lock.hold(str(tmp_path)):
        pass


def test_somebody_elses_file_in_the_locks_place_is_refused_and_kept(tmp_path):
    foreign = {
        "a": lambda path: path.write_text("machine: 12\n"),
        "b": lambda path: path.mkdir(),
        "c": os.mkfifo,
        "d": lambda path: path.symlink_to("/dev/null"),
    }
    for name, make in foreign.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "run.lock")
        refused = pytest.raises(ConfigError, match=r"^--workdir: .*run\.lock is not the lock of a")
        with refused, run_lock.hold(str(folder)):
            pass
    assert (tmp_path / "a" / "run.lock").read_text() == "machine: 12\n"


def lost(holder):
    raise AssertionError(f"lost to {holder}")


def take(folder, *, on_lost=lost, renewal=0.1, patience=1.0, pid=1):
    return claims.Claim.take(
        epath.Path(folder),
        holder={"pid": pid, "host": "there", "since": "2026-11-27 02:14"},
        on_lost=on_lost,
        renewal=renewal,
        patience=patience,
    )


@pytest.fixture
def slow(monkeypatch):
    """The claims' file system answers late, and not always equally late."""
    write, others = claims.Claim._write, claims.Claim._others

    def slow_write(self):
        time.sleep(0.02 + int(self._token[0], 16) / 400)
        write(self)

    def slow_others(self):
        found = others(self)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(claims.Claim, "_write", slow_write)
    monkeypatch.setattr(claims.Claim, "_others", slow_others)


def test_a_living_claim_is_respected_and_a_released_one_is_gone(tmp_path, slow):
    first = take(tmp_path, pid=7)
    with pytest.raises(claims.InUseError) as refused:
        take(tmp_path)
    assert claims.name(refused.value.holder) == "process 7 on there"
    assert len(list(tmp_path.iterdir())) == 1  # the refused one has left nothing
    first.release()
    take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_does_not_change_is_dead(tmp_path, slow):
    """Its process was killed: nothing renews it. What is no claim at all is dead, too."""
    dead = {"pid": 7, "host": "there", "state": "holding", "generation": 3, "counter": 9}
    (tmp_path / f"{'0' * 16}.json").write_text(json.dumps(dead))
    (tmp_path / f"{'1' * 16}.json").write_bytes(b"\xff\0")
    claim = take(tmp_path, patience=0.5)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["generation"] == 4
    claim.release()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_and_has_a_claims_name_is_refused_and_kept(tmp_path, network_disk, make):
    (tmp_path / "run.claims").mkdir()
    path = tmp_path / "run.claims" / f"{'0' * 16}.json"
    make(path)
    refused = pytest.raises(ConfigError, match=rf"^--workdir: .*{path.name} is not the lock of a ")
    with refused, run_lock.hold(str(tmp_path)):
        pass
    assert path.exists()


def test_somebody_elses_files_among_the_claims_are_no_claims(tmp_path):
    (tmp_path / "mine.json").write_text('{"my": "file"}')
    os.mkfifo(tmp_path / "pipe.json")
    claim = take(tmp_path, patience=1e9)
    claim.release()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "pipe.json"}


def test_a_holder_goes_on_where_what_is_no_claim_appears(tmp_path):
    claim = take(tmp_path)
    (tmp_path / f"{'0' * 16}.json").mkdir()
    was, until = claim._path.read_bytes(), time.monotonic() + 30
    while claim._path.read_bytes() == was and time.monotonic() < until:
        time.sleep(0.05)
    assert claim._path.read_bytes() != was
    claim.release()


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path):
    me = {**claims.myself(), "started": "1"}
    (tmp_path / f"{'0' * 16}.json").write_text(json.dumps({**me, "state": "holding"}))
    claim = take(tmp_path, patience=1e9)
    claim.release()


def test_of_many_that_claim_at_once_exactly_one_holds(tmp_path, slow):
    for attempt in range(3):
        outcomes = []
        barrier = threading.Barrier(4)

        def claim(outcomes=outcomes, barrier=barrier, folder=tmp_path / str(attempt)):
            barrier.wait()
            try:
                outcomes.append(take(folder))
            except claims.InUseError:
                outcomes.append(None)

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [outcome for outcome in outcomes if outcome is not None]
        assert len(held) == 1, outcomes
        held[0].release()


@pytest.mark.parametrize("there", ["gone", "taken"])
def test_a_holder_that_was_taken_over_learns_it(tmp_path, there):
    learned = []
    told = threading.Event()

    def on_lost(holder):
        learned.append(holder)
        told.set()

    claim = take(tmp_path, on_lost=on_lost)
    if there == "gone":
        claim._path.unlink()
    else:
        newer = {"pid": 9, "host": "here", "state": "holding", "generation": 2}
        (tmp_path / f"{'f' * 16}.json").write_text(json.dumps(newer))
    assert told.wait(30)
    assert learned == [{} if there == "gone" else newer]


def test_a_network_disk_has_claims_besides_the_kernels_lock(tmp_path, network_disk):
    with run_lock.hold(str(tmp_path)):
        assert len(list((tmp_path / "run.claims").glob("*.json"))) == 1
        assert (tmp_path / "run.lock").exists()
    assert not list((tmp_path / "run.claims").iterdir())


def test_without_flock_a_second_run_is_refused_by_its_claim(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    other = take(tmp_path / "run.claims", pid=7)
    refused = pytest.raises(ConfigError, match=r"is in use by process 7 on there since 2026-11-27")
    with refused, run_lock.hold(str(tmp_path)):
        pass
    other.release()
    with run_lock.hold(str(tmp_path)):
        pass
