"""Many hosts as one run: found, introduced to each other, watched, and ended together.

    cluster.start(cluster.Settings(platform="tpu"), config=config, workdir=workdir)
    ...
    if cluster.preemption_point():  # the same calls on all hosts: the same answer on all hosts
        save()
        raise cluster.Preempted(step)
    ...
    cluster.end(code=0)

What it adds to `jax.distributed`:

- Before JAX connects, all processes say hello to process 0 on the coordinator's port. Whoever is
  missing is named when the time is up, and hosts that differ in settings, code or library versions
  are refused by name.
- A watcher in every process, which ends it within seconds of another one's failure and within
  `heartbeat_timeout` of another one's silence, with one line that names the host. The main thread
  may then be stuck in a collective for good, so it isn't asked.
- SIGTERM (a preempted machine) becomes an answer of `preemption_point`; where there is nothing to
  save yet, the process leaves at once. A second SIGTERM always ends it at once.

Exit codes: 0 done; 2 a setting is wrong, or hosts disagree; 69 (EX_UNAVAILABLE) a host is missing
or lost; 75 (EX_TEMPFAIL) preempted: the same command continues the run; 1 anything else.

Without `start`, or in a process on its own, every function here does what one host needs: little.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform as python_platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from beit_jax.config import ConfigError, RunError, check, one_of

EXIT_PREEMPTED = 75
EXIT_LOST = 69
EXIT_SETTINGS = 2

LIBRARIES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow",
    "tensorflow-cpu",
    "numpy",
)
# Variables of machines that have a TPU; a run there is not meant for the CPU.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")

_HELLO = "beit_jax"  # what a process says first; strangers on the port say something else
_MAX_HELLO = 1 << 20  # bytes
_KEYS = "beit_jax/"  # in the coordination service's store
_POLL = 1.0  # seconds between looks at the others
# What XLA and gloo say in Python when the other end of a collective is gone.
_LOST_PEER = re.compile(r"gloo|connection|socket|unavailable|deadline|aborted|cancelled", re.I)


class ClusterError(RunError):
    """A host is missing, late or gone. The message is one line that names it."""


class Preempted(Exception):
    """The run was told to stop and is saved; the same command continues it."""

    def __init__(self, step: int):
        """`step` steps are done and in the checkpoint."""
        super().__init__(f"stopped by SIGTERM, saved at step {step}; the same command continues")
        self.step = step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How processes find each other, what they must run on, and how long each waits for the rest.

    Attributes:
      multihost: "auto" where a cluster is found or an address is given; "yes": it is an error if
        there is none; "no": a process on its own whatever is around it.
      coordinator_address: host:port of process 0; "" takes JAX_COORDINATOR_ADDRESS, or what the
        cluster says.
      num_processes: 0 takes JAX_NUM_PROCESSES, or what the cluster says.
      process_id: -1 takes JAX_PROCESS_ID, or what the cluster says.
      platform: "tpu", "gpu" or "cpu": anything else than that is an error; "any".
      start_timeout: seconds that hosts wait for each other at the start.
      heartbeat_timeout: seconds of silence after which a process is taken for dead.
      barrier_timeout: seconds that a process waits for the others where all must meet.
    """

    multihost: str = "auto"
    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = -1
    platform: str = "any"
    start_timeout: float = 300.0
    heartbeat_timeout: float = 100.0
    barrier_timeout: float = 600.0

    def __post_init__(self):
        one_of(self.multihost, "--multihost", "auto", "yes", "no")
        one_of(self.platform, "--platform", "any", "tpu", "gpu", "cpu")
        for name in ("start_timeout", "heartbeat_timeout", "barrier_timeout"):
            check(getattr(self, name) > 0, f"--{name}", "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Which process this is of how many, and where process 0 listens (host:port)."""

    address: str
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None


@dataclasses.dataclass
class _Session:
    """This process' part in the cluster; there is one per process, as there is one SIGTERM."""

    settings: Settings = dataclasses.field(default_factory=Settings)
    hosts: tuple[str, ...] = ("",)
    index: int = 0
    distributed: bool = False
    active: bool = False  # signals are ours
    running: bool = False  # there are steps that a checkpoint doesn't have
    told_to_stop: bool = False
    ticks: int = 0
    meetings: int = 0
    forward_signal: Callable[[int], None] | None = None
    stop_watching: threading.Event = dataclasses.field(default_factory=threading.Event)
    leaving: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    kept: list[Any] = dataclasses.field(default_factory=list)  # C callbacks, alive while installed


_session = _Session()


def start(settings: Settings, *, config: Mapping[str, Any], workdir: str) -> None:
    """Joins the cluster, if there is one, and checks that it is what the run needs.

    Call it once, from the main thread, before anything touches a device.

    Args:
      settings: see `Settings`.
      config: the resolved config; it must be the same on all hosts.
      workdir: the run's directory; also the same.

    Raises:
      ConfigError: hosts disagree, or this is not the platform that was expected.
      ClusterError: a process is missing or doesn't answer within `settings.start_timeout`.
    """
    _session.settings = settings
    _session.hosts = (socket.gethostname(),)
    _take_signals()
    place = find_place(settings)
    if place is not None:
        hello = describe_process(config=config, workdir=workdir)
        _session.hosts = introduce(place, hello, timeout=settings.start_timeout)
        _session.index = place.index
        _connect(place, settings)
    check_platform(settings.platform)
    log_process()


def find_place(settings: Settings, environment: Mapping[str, str] = os.environ) -> Place | None:
    """Which process this is: by the settings, JAX's variables, or the cluster around; None: alone.

    Raises:
      ConfigError: a cluster was asked for and there is none, or it is half described.
    """
    if settings.multihost == "no":
        return None
    address = settings.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    count = settings.num_processes or _whole_number(environment, "JAX_NUM_PROCESSES")
    index = settings.process_id
    if index < 0:
        index = _whole_number(environment, "JAX_PROCESS_ID")
    local = None
    asked = address is not None or settings.multihost == "yes"
    if None in (address, count, index) and (asked or _cluster_around(environment)):
        # JAX's own knowledge of Cloud TPU, GKE, Slurm, Open MPI and Kubernetes: what a bare
        # jax.distributed.initialize() asks. It has no public name.
        from jax._src.clusters import ClusterEnv

        address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, int(settings.start_timeout)
        )
    if None in (address, count, index):
        missing = [
            name
            for name, value in (
                ("--coordinator_address (JAX_COORDINATOR_ADDRESS)", address),
                ("--num_processes (JAX_NUM_PROCESSES)", count),
                ("--process_id (JAX_PROCESS_ID)", index),
            )
            if value is None
        ]
        check(
            not asked,
            "--multihost",
            f"no cluster that JAX knows is here, and not given: {', '.join(missing)}",
        )
        return None
    check(":" in address, "--coordinator_address", f"{address!r} is not host:port")
    check(0 <= index < count, "--process_id", f"{index} is not one of {count}")
    if count == 1 and settings.multihost != "yes":
        return None
    return Place(
        address=address,
        count=count,
        index=index,
        local_device_ids=tuple(local) if local else None,
    )


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    check(value.isdecimal(), name, f"must be a number, got {value!r}")
    return int(value)


def _cluster_around(environment: Mapping[str, str]) -> bool:
    """Whether to ask JAX for a cluster: that may take seconds, and a laptop has none."""
    tasks = ("MEGASCALE_NUM_SLICES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(environment.get(name) or 1) > 1 for name in tasks):
        return True
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts
    # A Cloud TPU VM names its neighbours only when its metadata server is asked.
    chips = (*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev").glob("vfio/[0-9]*"))
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def describe_process(*, config: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """What must be the same on all hosts, nested under the name each difference is reported by."""
    return {
        "config": json.loads(json.dumps(config)),
        "--workdir": workdir,
        "code of beit_jax": code_version(),
        "version": library_versions() | {"python": python_platform.python_version()},
    }


def code_version(root: pathlib.Path | None = None) -> str:
    """A hash of the package's source files; hexadecimal, 12 digits."""
    root = root or pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; libraries that aren't installed are left out."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def introduce(place: Place, hello: dict[str, Any], *, timeout: float) -> tuple[str, ...]:
    """Meets all other processes on the coordinator's port, before JAX takes it.

    Args:
      place: who this is.
      hello: from `describe_process`.
      timeout: seconds.

    Returns:
      The names of the hosts, in the order of processes.

    Raises:
      ConfigError: processes disagree.
      ClusterError: some did not come in time; or process 0 can't be reached.
    """
    card = {
        "hello": _HELLO,
        "index": place.index,
        "count": place.count,
        "host": socket.gethostname(),
        "facts": hello,
    }
    verdict = _receive_all(place, card, timeout) if place.index == 0 else _ask(place, card, timeout)
    if verdict["disagreement"]:
        raise ConfigError(verdict["disagreement"])
    if verdict["missing"]:
        raise ClusterError(verdict["missing"])
    return tuple(verdict["hosts"])


def _receive_all(place: Place, card: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Process 0's side: waits for all, judges, tells all."""
    port = int(place.address.rsplit(":", 1)[1])
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=place.count,
        )
    except OSError as error:
        raise ClusterError(
            f"process 0 can't listen on port {port} of {card['host']}: {error.strerror}; is an"
            " earlier run still alive there?"
        ) from None
    cards = {0: card}
    connections = []
    disagreement = ""
    deadline = time.monotonic() + timeout
    with server:
        while len(cards) < place.count and not disagreement:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            connection.settimeout(min(5.0, timeout))
            other = _read_line(connection)
            if other is None or other.get("hello") != _HELLO:
                connection.close()  # a stranger, or one that gave up
                continue
            connections.append(connection)
            index = other["index"]
            if other["count"] != place.count:
                disagreement = (
                    f"--num_processes: {place.count} on process 0 ({card['host']}),"
                    f" {other['count']} on process {index} ({other['host']})"
                )
            elif index in cards:
                disagreement = (
                    f"--process_id: both {cards[index]['host']} and {other['host']} say that they"
                    f" are process {index}"
                )
            else:
                cards[index] = other
        hosts = [cards[i]["host"] if i in cards else "" for i in range(place.count)]
        absent = [i for i in range(place.count) if i not in cards]
        missing = ""
        if not disagreement:
            facts = {i: each["facts"] for i, each in sorted(cards.items())}
            disagreement = differences(facts, hosts=hosts)
        if not disagreement and absent:
            expected = _expected_hosts()
            names = ", ".join(
                f"{i} ({expected[i]})" if len(expected) == place.count else str(i) for i in absent
            )
            missing = (
                f"{len(absent)} of {place.count} processes did not start within {timeout:.0f} s:"
                f" process {names}; is the command running on every host?"
            )
        verdict = {"hosts": hosts, "disagreement": disagreement, "missing": missing}
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(verdict).encode() + b"\n")
        for connection in connections:
            # The other side hangs up first: the port is then free for JAX at once.
            with contextlib.suppress(OSError):
                connection.recv(1)
            connection.close()
    return verdict


def _ask(place: Place, card: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The side of all other processes."""
    host, port = place.address.rsplit(":", 1)
    host = host.strip("[]")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5.0) as connection:
                connection.sendall(json.dumps(card).encode() + b"\n")
                # Process 0 may have started later, and then waits longer.
                connection.settimeout(timeout + 10.0)
                verdict = _read_line(connection)
            if verdict is not None and "hosts" in verdict:
                return verdict
        except OSError:
            pass
        time.sleep(0.2)
    raise ClusterError(
        f"process {place.index} ({card['host']}): no answer from process 0 at {place.address}"
        f" within {timeout:.0f} s; is it running, and may this host reach that port?"
    )


def _read_line(connection: socket.socket) -> dict[str, Any] | None:
    """One line of JSON; None where something else comes, or nothing."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _MAX_HELLO:
            part = connection.recv(1 << 16)
            if not part:
                return None
            data += part
        value = json.loads(data)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _expected_hosts() -> list[str]:
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return names.split(",") if names else []


def differences(facts: Mapping[int, Mapping[str, Any]], *, hosts: Iterable[str]) -> str:
    """One line on what differs between processes and where; "" where nothing does."""
    hosts = list(hosts)
    flat = {index: dict(_flatten(each)) for index, each in facts.items()}
    names = sorted({name for each in flat.values() for name in each})
    lines = []
    for name in names:
        groups: dict[str, list[int]] = {}
        for index, each in flat.items():
            groups.setdefault(repr(each[name]) if name in each else "absent", []).append(index)
        if len(groups) > 1:
            lines.append(
                f"{name}: "
                + ", ".join(
                    f"{value} on {_name_processes(group, hosts)}" for value, group in groups.items()
                )
            )
    return f"hosts disagree: {'; '.join(lines)}" if lines else ""


def _flatten(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _flatten(value, name)
        else:
            yield name, value


def _name_processes(indices: list[int], hosts: list[str], most: int = 4) -> str:
    shown = ", ".join(f"{i} ({hosts[i]})" for i in indices[:most])
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"


def _connect(place: Place, settings: Settings) -> None:
    """Joins JAX's cluster and starts to watch the others."""
    _session.distributed = True
    # XLA ends a process by abort() from a thread of its own when process 0 is gone; this is the
    # last word after XLA's, and the exit code a launcher understands.
    _on_abort()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.local_device_ids,
        # Introductions are over: whoever is late now has died since.
        initialization_timeout=int(max(settings.start_timeout, 1)),
        # The watcher is faster and says more; this is for when it can't.
        heartbeat_timeout_seconds=int(2 * settings.heartbeat_timeout + 10),
        shutdown_timeout_seconds=int(max(settings.barrier_timeout, 1)),
    )
    _chain_sigterm()
    threading.Thread(target=_watch, name="cluster watcher", daemon=True).start()


def _client() -> Any:
    """The coordination service as jaxlib offers it; public JAX has no key-value store."""
    from jax._src.distributed import global_state

    return global_state.client


def check_platform(expected: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where JAX runs on something else than expected.

    With "any", a machine that says it has a TPU is expected to use it, unless JAX_PLATFORMS says
    what to use.
    """
    reason = f"--platform={expected}"
    if expected == "any":
        said = [name for name in TPU_VARIABLES if environment.get(name)]
        if not said or environment.get("JAX_PLATFORMS"):
            return
        expected, reason = "tpu", f"{said[0]} is set"
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that can't be opened
        found = f"none ({str(error).splitlines()[0]})"
    if found == expected:
        return
    hint = {
        "tpu": "is jax[tpu] installed, and no other process using the TPU (/tmp/libtpu_lockfile)?",
        "gpu": "is jax[cuda13] installed, with a driver that matches?",
        "cpu": "set JAX_PLATFORMS=cpu",
    }[expected]
    raise ConfigError(
        f"--platform: expected {expected} ({reason}), but JAX on {socket.gethostname()} found"
        f" {found}; {hint}"
    )


def log_process() -> None:
    """One line on this process: which of how many, where, with what."""
    devices = jax.local_devices()
    versions = library_versions()
    logging.info(
        "process %d/%d on %s: %d × %s (%s), %d in all; %s, beit_jax %s",
        jax.process_index() + 1,
        jax.process_count(),
        socket.gethostname(),
        len(devices),
        devices[0].device_kind,
        devices[0].platform,
        jax.device_count(),
        ", ".join(
            f"{name} {versions[name]}"
            for name in ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint")
            if name in versions
        ),
        code_version(),
    )


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Raises:
      ClusterError: some did not come within the settings' `barrier_timeout`; it names them.
    """
    if jax.process_count() == 1:
        return
    _session.meetings += 1
    seconds = _session.settings.barrier_timeout
    try:
        _client().wait_at_barrier(f"{_KEYS}{name}/{_session.meetings}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise ClusterError(
            f"waited {seconds:.0f} s for all processes {name}; {_absent(str(error))}"
        ) from error


def _absent(message: str) -> str:
    """Who did not come, out of the coordination service's words."""
    found = re.search(r"timed out task names:\s*((?:\S*\d+\s+)+)", message)
    if not found:
        return f"the coordination service says: {message.splitlines()[0]}"
    indices = sorted(int(re.findall(r"\d+", word)[-1]) for word in found[1].split())
    hosts = list(_session.hosts)
    hosts += ["?"] * (max(indices) + 1 - len(hosts))
    return f"missing: {_name_processes(indices, hosts)}"


def check_agreement(name: str, value: Any) -> None:
    """Raises ConfigError unless all processes bring the same value (JSON) under this name."""
    if jax.process_count() == 1:
        return
    values = gather(name, value)
    message = differences({i: {name: each} for i, each in enumerate(values)}, hosts=_hosts())
    if message:
        raise ConfigError(message)


def gather(name: str, value: Any) -> list[Any]:
    """Every process' value (JSON), in the order of processes; for small things between steps."""
    if jax.process_count() == 1:
        return [value]
    folder = f"{_KEYS}gather/{name}/{_session.meetings}/"
    _client().key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
    barrier(f"at {name}")
    entries = {
        int(key.rsplit("/", 1)[1]): each for key, each in _client().key_value_dir_get(folder)
    }
    return [json.loads(entries[i]) for i in range(jax.process_count())]


def _hosts() -> list[str]:
    missing = jax.process_count() - len(_session.hosts)
    return [*_session.hosts, *["?"] * missing]


def set_running(running: bool) -> None:
    """Says whether there is work that a SIGTERM must not lose; until then it ends the process."""
    _session.running = running


def preemption_point() -> bool:
    """Whether to save and leave now.

    All processes call it the same number of times between the same steps and evaluation batches;
    then they all get True at the same call, some calls after SIGTERM came to any of them.
    """
    _session.ticks += 1
    if _session.distributed:
        return multihost_utils.reached_preemption_sync_point(_session.ticks)
    return _session.told_to_stop


def end(*, code: int, error: BaseException | None = None, message: str = "") -> int:
    """Leaves the cluster together with the others, or tells them why this process can't go on.

    After a failure a cluster's process does not return from here: the others may be waiting for it
    in a collective, and JAX's own exit would wait for them.

    Args:
      code: of the exit.
      error: what went wrong, if anything did.
      message: one line about it; "" shows where it happened.

    Returns:
      `code`.
    """
    good = error is None or isinstance(error, Preempted)
    if _session.distributed and good:
        try:
            barrier("at the end")
        except ClusterError as late:
            _leave(str(late), EXIT_LOST)
        _session.stop_watching.set()
        jax.distributed.shutdown()
        _session.distributed = False
    elif _session.distributed and not message and _LOST_PEER.search(str(error)):
        # More likely the other end is gone than this one at fault. The watcher will know which, and
        # ends the process.
        time.sleep(_session.settings.heartbeat_timeout + 5 * _POLL)
    _session.stop_watching.set()
    if message:
        print(message if good else f"error: {message}", file=sys.stderr, flush=True)
    elif error is not None:
        traceback.print_exception(error)
    if _session.distributed:
        name = f"process {_session.index} ({_session.hosts[_session.index]})"
        said = message or f"{type(error).__name__}: {error}".splitlines()[0]
        _tell_others(f"{name} ended: {said}", code)
        _leave("", code)
    return code


def _tell_others(message: str, code: int) -> None:
    with contextlib.suppress(Exception):  # where the service is gone there is nobody to tell
        _client().key_value_set(
            f"{_KEYS}end/{_session.index}", json.dumps({"message": message, "code": code})
        )
        if _session.index == 0:
            # The others hear it from the service, which ends with this process.
            time.sleep(3 * _POLL)


def _leave(message: str, code: int) -> None:
    """Ends the process at once, from any thread, with at most one line."""
    if not _session.leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    if message:
        print(f"error: {message}" if code != EXIT_PREEMPTED else message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _watch() -> None:
    """Until the end: says that this process lives, and looks whether the others do."""
    client, index, hosts = _client(), _session.index, _session.hosts
    limit = _session.settings.heartbeat_timeout
    poll = min(_POLL, limit / 5)
    beat, beat_due = 0, 0.0
    heard = {i: ("", time.monotonic()) for i in range(len(hosts))}
    while not _session.stop_watching.wait(poll):
        now = time.monotonic()
        try:
            for _, text in client.key_value_dir_get(f"{_KEYS}end/"):
                said = json.loads(text)  # not this process': it stops watching before it says so
                _leave(said["message"], said["code"])
            if now >= beat_due:
                beat, beat_due = beat + 1, now + limit / 5
                client.key_value_set(f"{_KEYS}alive/{index}", str(beat), allow_overwrite=True)
            # One looks at all, all look at one: the service is not asked hosts² times.
            if index == 0 and heard:
                for key, text in client.key_value_dir_get(f"{_KEYS}alive/"):
                    i = int(key.rsplit("/", 1)[1])
                    if heard[i][0] != text:
                        heard[i] = (text, now)
        except Exception as error:  # whatever it is, a watcher that is gone would watch nothing
            if _session.stop_watching.is_set():
                return
            _leave(_lost_coordinator(str(error).split("\n")[0]), EXIT_LOST)
        silent = [i for i, (_, since) in heard.items() if now - since > limit]
        if index == 0 and silent:
            message = (
                f"lost {_name_processes(silent, list(hosts))}: not heard of for {limit:.0f} s;"
                " it was killed, or its machine or network is gone"
            )
            _tell_others(message, EXIT_LOST)
            _leave(message, EXIT_LOST)


def _lost_coordinator(reason: str) -> str:
    return (
        f"lost process 0 ({_session.hosts[0]}), or the connection to it, at process"
        f" {_session.index} ({_session.hosts[_session.index]}): {reason}"
    )


_CHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _install_c_handler(number: int, handler: Any) -> int | None:
    """signal(2), as it was before Python's: returns the address of the handler before."""
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return library.signal(number, ctypes.cast(handler, ctypes.c_void_p) if handler else None)


def _on_abort() -> None:
    """Gives XLA's abort() a readable last line and an exit code."""

    @_CHandler
    def say_why(number: int) -> None:
        # abort() gives a handler no second chance, but all the time it wants.
        del number
        _leave(
            _lost_coordinator("JAX's coordination service ended this process, see above"),
            EXIT_LOST,
        )

    _session.kept.append(say_why)
    _install_c_handler(signal.SIGABRT, say_why)


def _take_signals() -> None:
    """Makes SIGTERM ours; a thread of its own hears it even while the main one compiles."""
    if _session.active or threading.current_thread() is not threading.main_thread():
        return
    _session.active = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # without one nobody is woken

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                _terminated()

    threading.Thread(target=listen, name="SIGTERM", daemon=True).start()


def _chain_sigterm() -> None:
    """Puts our handler back before JAX's, which tells the other hosts when ours calls it."""
    theirs = _install_c_handler(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if theirs:
        _session.forward_signal = _CHandler(theirs)


def _terminated() -> None:
    """What SIGTERM does; runs in the thread that listens for it."""
    name = f"process {_session.index} ({_session.hosts[_session.index]})"
    if _session.told_to_stop:
        _leave(f"{name}: second SIGTERM, leaving without saving", EXIT_PREEMPTED)
    _session.told_to_stop = True
    if not _session.running:
        message = f"{name}: SIGTERM with nothing to save; the same command continues"
        if _session.distributed:
            _tell_others(message, EXIT_PREEMPTED)
        _leave(message, EXIT_PREEMPTED)
    print(f"{name}: SIGTERM, saving before the next step", file=sys.stderr, flush=True)
    if _session.forward_signal is not None:
        _session.forward_signal(signal.SIGTERM)
