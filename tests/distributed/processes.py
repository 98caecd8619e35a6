"""Starts the processes of a run on this machine and reads what they leave."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from beit_jax.training import metrics
from tests.compiling import QUICKLY

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300  # seconds; a busy machine is slow, a hang is longer

ENVIRONMENT = {
    "XLA_FLAGS": QUICKLY,  # one device
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Most of what the processes compile is the same.
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/beit_jax_multihost_{os.getpid()}",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

atexit.register(shutil.rmtree, ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def values(**changes) -> dict:
    """The regression's config; dotted names by keyword with two underscores."""
    config = {
        "task": "regression",
        "run": {
            "steps": 20,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 0,
            "checkpoint_minutes": 0.0,
        },
        "optimizer": {"learning_rate": 0.3, "warmup_steps": 3, "weight_decay": 0.0},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    return config


class Run:
    """`count` processes of one run.

    `only` starts some of them; `change` gives a process its own config, `clocks` its own time, in
    seconds ahead.
    """

    def __init__(self, workdir, config, *, count, only=None, change=None, clocks=None, **cluster):
        self.workdir = Path(workdir)
        self.processes = {}
        self.outputs = {}
        self._config, self._count, self._change = config, count, change
        self._clocks = clocks or {}
        self._cluster = {"start_timeout": PATIENCE, "heartbeat_timeout": 60.0} | cluster
        self._port = free_port()
        for index in range(count) if only is None else only:
            self.start(index)

    def start(self, index: int) -> None:
        """Starts a process that `only` left out."""
        settings = dict(self._cluster)
        if self._count > 1:
            settings |= {
                "coordinator_address": f"127.0.0.1:{self._port}",
                "num_processes": self._count,
                "process_id": index,
            }
        asked = {
            "values": self._change(index) if self._change else self._config,
            "workdir": str(self.workdir),
            "cluster": settings,
            "clock": self._clocks.get(index, 0.0),
        }
        log = Path(f"{self.workdir}.{index}.log")
        self.outputs[index] = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.processes[index] = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.distributed.worker", json.dumps(asked)],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self, *, timeout=PATIENCE) -> dict[int, int]:
        """Exit codes by process."""
        deadline = time.monotonic() + timeout
        try:
            return {
                i: process.wait(max(deadline - time.monotonic(), 0.1))
                for i, process in self.processes.items()
            }
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {timeout} s:\n{self.everything()}") from None

    def output(self, index: int) -> str:
        return self.outputs[index].read_text()

    def everything(self) -> str:
        return "\n".join(f"--- {i}\n{self.output(i)}" for i in self.outputs)

    def wait_for_text(self, text: str, *, index: int = 0) -> None:
        """Until a process has said something."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output(index):
            assert self.processes[index].poll() is None, self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.02)

    def errors(self, index: int) -> list[str]:
        return [line for line in self.output(index).splitlines() if line.startswith("error: ")]


def finish(workdir, config, *, count, **settings) -> Run:
    """A run that must succeed."""
    with Run(workdir, config, count=count, **settings) as run:
        assert set(run.wait().values()) == {0}, run.everything()
    return run


def losses(workdir) -> dict[int, float]:
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def evaluations(workdir) -> dict[int, float]:
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def saved_steps(workdir) -> list[int]:
    return sorted(
        int(p.name) for p in (Path(workdir) / "checkpoints").iterdir() if p.name.isdigit()
    )


def saved_state(workdir):
    """Every array of the newest checkpoint as numpy, with its path."""
    import orbax.checkpoint as ocp

    folder = Path(workdir) / "checkpoints" / str(saved_steps(workdir)[-1]) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    return jax.tree_util.tree_leaves_with_path(tree)


def assert_same_state(first, second) -> None:
    """Bit for bit."""
    for (path, a), (_, b) in zip(saved_state(first), saved_state(second), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
