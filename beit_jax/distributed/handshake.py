"""The introductions: all processes greet process 0 on the coordinator's port before JAX takes it.

Process 0 waits for all, compares what they say about themselves, and tells all the same verdict.
Every message is one line of JSON.
"""

import contextlib
import json
import os
import platform as python_platform
import socket
import time
from collections.abc import Mapping, Sequence

from beit_jax.config import ConfigError
from beit_jax.config.differences import differences
from beit_jax.distributed.discovery import Membership
from beit_jax.distributed.session import ClusterError, name_processes
from beit_jax.distributed.versions import code_version, library_versions
from beit_jax.json_text import JsonError, json_object
from beit_jax.types import Json, JsonObject

_GREETING = "beit_jax"  # tells a process of this run from a stranger on the port
_MAX_MESSAGE = 1 << 20  # bytes


def describe_process(*, config: Mapping[str, Json], workdir: str) -> JsonObject:
    """What must be the same on all hosts, nested under the names that a difference is reported by.

    Args:
      config: the resolved config.
      workdir: the run's directory.
    """
    return {
        "config": json.loads(json.dumps(config)),
        "--workdir": workdir,
        "code of beit_jax": code_version(),
        "version": library_versions() | {"python": python_platform.python_version()},
    }


def introduce(member: Membership, facts: JsonObject, *, timeout: float) -> tuple[str, ...]:
    """Meets all other processes on the coordinator's port, before JAX takes it.

    Args:
      member: which process this is.
      facts: from `describe_process`.
      timeout: seconds.

    Returns:
      The names of the hosts, in the order of processes.

    Raises:
      ConfigError: processes disagree.
      ClusterError: some did not come in time, or process 0 cannot be reached.
    """
    hello = {
        "hello": _GREETING,
        "index": member.index,
        "count": member.count,
        "host": socket.gethostname(),
        "facts": facts,
    }
    judge = _receive_all if member.index == 0 else _ask
    verdict = judge(member, hello, timeout=timeout)
    if verdict["disagreement"]:
        raise ConfigError(verdict["disagreement"])
    if verdict["missing"]:
        raise ClusterError(verdict["missing"])
    return tuple(verdict["hosts"])


def _receive_all(member: Membership, hello: JsonObject, *, timeout: float) -> JsonObject:
    """Process 0's part: waits for all, judges, tells all."""
    connections: list[socket.socket] = []
    with _listen(member, host=hello["host"]) as server:
        hellos, disagreement = _collect(server, member, hello, connections, timeout=timeout)
        hosts = [hellos[i]["host"] if i in hellos else "" for i in range(member.count)]
        if not disagreement:
            disagreement = describe_differences(
                {i: received["facts"] for i, received in sorted(hellos.items())}, hosts=hosts
            )
        absent = [i for i in range(member.count) if i not in hellos]
        missing = ""
        if not disagreement and absent:
            missing = _missing(absent, count=member.count, timeout=timeout)
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


def _listen(member: Membership, *, host: str) -> socket.socket:
    port = int(member.address.rsplit(":", 1)[1])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=member.count,
        )
    except OSError as error:
        raise ClusterError(
            f"process 0 can't listen on port {port} of {host}: {error.strerror}; is an earlier run"
            " still alive there?"
        ) from None


def _collect(
    server: socket.socket,
    member: Membership,
    hello: JsonObject,
    connections: list[socket.socket],
    *,
    timeout: float,
) -> tuple[dict[int, JsonObject], str]:
    """Waits for the other processes' hellos, until all are here or two contradict each other.

    Args:
      server: listens on the coordinator's port.
      member: process 0.
      hello: its own.
      connections: gets the connection of every process that came, to be answered.
      timeout: seconds.

    Returns:
      The hellos by process, and the contradiction; "" where there is none.
    """
    hellos = {0: hello}
    deadline = time.monotonic() + timeout
    while len(hellos) < member.count:
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
        if other is None or other.get("hello") != _GREETING:
            connection.close()  # a stranger, or a process that gave up
            continue
        connections.append(connection)
        index = other["index"]
        if other["count"] != member.count:
            return hellos, (
                f"--num_processes: {member.count} on process 0 ({hello['host']}),"
                f" {other['count']} on process {index} ({other['host']})"
            )
        if index in hellos:
            return hellos, (
                f"--process_id: both {hellos[index]['host']} and {other['host']} say that they"
                f" are process {index}"
            )
        hellos[index] = other
    return hellos, ""


def _missing(absent: Sequence[int], *, count: int, timeout: float) -> str:
    """Names the processes that did not come; their hosts too where the machine knows them."""
    variable = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    expected = variable.split(",") if variable else []
    names = ", ".join(f"{i} ({expected[i]})" if len(expected) == count else str(i) for i in absent)
    return (
        f"{len(absent)} of {count} processes did not start within {timeout:.0f} s:"
        f" process {names}; is the command running on every host?"
    )


def _ask(member: Membership, hello: JsonObject, *, timeout: float) -> JsonObject:
    """The part of all other processes: says hello and waits for the verdict."""
    host, port = member.address.rsplit(":", 1)
    host = host.strip("[]")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5.0) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # Process 0 may have started later, and then waits longer.
                connection.settimeout(timeout + 10.0)
                verdict = _read_line(connection)
            if verdict is not None and "hosts" in verdict:
                return verdict
        except OSError:
            pass
        time.sleep(0.2)
    raise ClusterError(
        f"process {member.index} ({hello['host']}): no answer from process 0 at {member.address}"
        f" within {timeout:.0f} s; is it running, and may this host reach that port?"
    )


def _read_line(connection: socket.socket) -> JsonObject | None:
    """One line of JSON; None where nothing comes, or something else."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _MAX_MESSAGE:
            part = connection.recv(1 << 16)
            if not part:
                return None
            data += part
        return json_object(data, path="a message")
    except (OSError, JsonError):
        return None


def describe_differences(facts: Mapping[int, Mapping[str, Json]], *, hosts: Sequence[str]) -> str:
    """Says in one line what differs between processes, and on which; "" where nothing does.

    Args:
      facts: by process, nested under the names that a difference is reported by.
      hosts: the processes' host names.
    """
    lines = []
    for name, values in differences(facts).items():
        groups: dict[str, list[int]] = {}
        for index, value in values.items():
            groups.setdefault(repr(value), []).append(index)
        sides = (f"{value} on {name_processes(on, hosts)}" for value, on in groups.items())
        lines.append(f"{name}: {', '.join(sides)}")
    return f"hosts disagree: {'; '.join(lines)}" if lines else ""
