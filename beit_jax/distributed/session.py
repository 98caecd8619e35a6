"""The state that this process keeps about its cluster, shared by the modules of this package.

There is one `session` per process, as there is one coordination service and one SIGTERM.
"""

import ctypes
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import jax

from beit_jax.config import RunError
from beit_jax.distributed.discovery import Settings

EXIT_PREEMPTED = 75
EXIT_LOST = 69
EXIT_SETTINGS = 2

KEYS = "beit_jax/"  # prefix of every key in the coordination service's store
_MOST_NAMED = 4  # processes that a message names before it counts the rest


class ClusterError(RunError):
    """A host is missing, late or gone. The message is one line that names it."""


class Preempted(Exception):
    """The run was told to stop and has been saved; the same command continues it."""

    def __init__(self, step: int):
        """`step` is how many steps the checkpoint holds."""
        super().__init__(f"stopped by SIGTERM, saved at step {step}; the same command continues")
        self.step = step


@dataclasses.dataclass
class Session:
    """What this process knows about the cluster.

    Attributes:
      settings: as given to `cluster.start`.
      hosts: the processes' host names, in the order of processes.
      index: this process.
      distributed: whether JAX is connected to other processes.
      signals_taken: whether SIGTERM comes to this package's handler.
      running: whether there are steps that no checkpoint has yet.
      told_to_stop: whether SIGTERM has come.
      preemption_points: how many calls of `preemption_point` there have been.
      meetings: how many barriers there have been.
      forward_signal: JAX's own handler, which tells the other processes of a SIGTERM.
      stop_watching: set when the watcher should end.
      leaving: held by the thread that ends the process.
      c_callbacks: C callbacks must stay alive while they are installed.
    """

    settings: Settings = dataclasses.field(default_factory=Settings)
    hosts: tuple[str, ...] = ("",)
    index: int = 0
    distributed: bool = False
    signals_taken: bool = False
    running: bool = False
    told_to_stop: bool = False
    preemption_points: int = 0
    meetings: int = 0
    forward_signal: Callable[[int], None] | None = None
    stop_watching: threading.Event = dataclasses.field(default_factory=threading.Event)
    leaving: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    c_callbacks: list["ctypes._CFunctionType"] = dataclasses.field(default_factory=list)

    def process_name(self) -> str:
        """This process in messages: "process 3 (host-3)"."""
        return name_processes([self.index], self.hosts)

    def all_hosts(self) -> list[str]:
        """A host name for every process that JAX counts; "?" where there was no introduction."""
        unknown = jax.process_count() - len(self.hosts)
        return [*self.hosts, *["?"] * unknown]


session = Session()


class CoordinationClient(Protocol):
    """What this package uses of jaxlib's client, whose own type is private."""

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool = False) -> None:
        """Stores a value for all processes to read; without `allow_overwrite` only once."""

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        """Keys and values of everything under a prefix that ends in "/"."""

    def wait_at_barrier(self, name: str, timeout_in_ms: int) -> None:
        """Waits for all processes; raises `jax.errors.JaxRuntimeError` when the time is up."""


def coordination_client() -> CoordinationClient:
    """The coordination service's client; public JAX offers no key-value store."""
    from jax._src.distributed import global_state

    return cast(CoordinationClient, global_state.client)


def name_processes(indices: Sequence[int], hosts: Sequence[str]) -> str:
    """Processes in messages: "processes 0 (h0), 1 (h1)"; beyond four, the rest is counted."""
    shown = ", ".join(f"{i} ({hosts[i]})" for i in indices[:_MOST_NAMED])
    rest = len(indices) - _MOST_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"
