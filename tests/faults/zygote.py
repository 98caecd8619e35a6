"""Runs the project's programs in forks of a process that has imported everything.

A start takes half a minute of imports on a busy machine, and a kill needs a start. What runs is the
program's own code; a fork differs from a fresh process in nothing but what is imported already.

    python -m tests.faults.zygote MODULE...   # a request in JSON on each line of its stdin

It must never touch a device itself: a fork of a process with JAX's threads would hang.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.distributed.processes import ENVIRONMENT, ROOT

TRAINING = ("tensorflow", "clu.metric_writers", "beit_jax.jobs", "tests.tasks.tiny")
PATIENCE = 300.0


class Zygote:
    """The process to fork; a context, which ends it and the runs that are left.

    Args:
      modules: what to import beforehand.
      folder: for output and exit codes of the runs.
    """

    def __init__(self, *, modules: tuple[str, ...], folder: Path):
        self._folder = folder
        self._started: list[Forked] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.faults.zygote", *modules],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *exception) -> None:
        for run in self._started:  # a failed test leaves some
            run.kill()
        self._process.stdin.close()
        self._process.wait()

    def run(self, program: str, *words: str) -> "Forked":
        """Starts `main.py`, or a module by its name, with these words on its command line."""
        path = self._folder / str(len(self._started))
        request = {"program": program, "words": words, "path": str(path)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._started.append(Forked(path))
        return self._started[-1]


class Forked:
    """A program in a fork.

    Attributes:
      pid: its process.
      began: seconds since the epoch.
    """

    def __init__(self, path: Path):
        self._path, self.began = path, time.time()
        self.pid = int(_wait_for(path.with_suffix(".pid"), timeout=PATIENCE))

    def exit_code(self) -> int | None:
        """None while it runs."""
        path = self._path.with_suffix(".code")
        return int(path.read_text()) if path.exists() else None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, where it still runs."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def wait(self, *, timeout: float = PATIENCE) -> int:
        """Its exit code, negative for a signal."""
        return int(_wait_for(self._path.with_suffix(".code"), timeout=timeout))

    def output(self) -> str:
        """What it has said on stdout and stderr."""
        return self._path.with_suffix(".log").read_text(errors="replace")


def _wait_for(path: Path, *, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} is not there after {timeout:.0f} s")
        time.sleep(0.002)
    return path.read_text()


def _say(path: str, text: str) -> None:
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def _keep(request: dict) -> None:
    """Forks the program and notes its process and its exit code."""
    pid = os.fork()
    if pid == 0:
        _become(request)
    _say(f"{request['path']}.pid", str(pid))
    _, status = os.waitpid(pid, 0)
    _say(f"{request['path']}.code", str(os.waitstatus_to_exitcode(status)))


def _become(request: dict) -> None:
    log = os.open(f"{request['path']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        sys.argv = [request["program"], *request["words"]]
        if request["program"].endswith(".py"):
            runpy.run_path(request["program"], run_name="__main__")
        else:
            runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Imports, then forks a keeper for each request, which forks the program."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        if os.fork() == 0:
            _keep(json.loads(line))
            os._exit(0)
        while True:  # keepers that have ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


if __name__ == "__main__":
    main()
