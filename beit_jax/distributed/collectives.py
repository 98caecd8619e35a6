"""Small messages between processes through JAX's coordination service, outside compiled programs.

With one process these return at once.
"""

import json
import re

import jax

from beit_jax.config import ConfigError
from beit_jax.distributed.handshake import describe_differences
from beit_jax.distributed.session import (
    KEYS,
    ClusterError,
    coordination_client,
    name_processes,
    session,
)
from beit_jax.types import Json


def barrier(purpose: str) -> None:
    """Waits until all processes are here.

    Args:
      purpose: completes "waited 600 s for all processes …" in the error.

    Raises:
      ClusterError: some did not come within the settings' `barrier_timeout`; it names them.
    """
    if jax.process_count() == 1:
        return
    session.meetings += 1
    seconds = session.settings.barrier_timeout
    try:
        coordination_client().wait_at_barrier(
            f"{KEYS}{purpose}/{session.meetings}", int(1000 * seconds)
        )
    except jax.errors.JaxRuntimeError as error:
        raise ClusterError(
            f"waited {seconds:.0f} s for all processes {purpose}; {absent(str(error))}"
        ) from error


def absent(message: str) -> str:
    """Names the processes that did not come, from the coordination service's error message."""
    found = re.search(r"timed out task names:\s*((?:\S*\d+\s+)+)", message)
    if not found:
        return f"the coordination service says: {message.splitlines()[0]}"
    indices = sorted(int(re.findall(r"\d+", word)[-1]) for word in found[1].split())
    hosts = list(session.hosts)
    hosts += ["?"] * (max(indices) + 1 - len(hosts))
    return f"missing: {name_processes(indices, hosts)}"


def check_agreement(name: str, value: Json) -> None:
    """Checks that all processes bring the same value under this name.

    Raises:
      ConfigError: they differ; it names the value and the processes.
    """
    if jax.process_count() == 1:
        return
    values = gather(name, value)
    message = describe_differences(
        {i: {name: received} for i, received in enumerate(values)}, hosts=session.all_hosts()
    )
    if message:
        raise ConfigError(message)


def gather(name: str, value: Json) -> list[Json]:
    """Every process' value, in the order of processes; for small values between steps.

    Raises:
      ClusterError: a process did not come; see `barrier`.
    """
    if jax.process_count() == 1:
        return [value]
    client = coordination_client()
    folder = f"{KEYS}gather/{name}/{session.meetings}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
    barrier(f"at {name}")
    entries = {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(folder)}
    return [json.loads(entries[i]) for i in range(jax.process_count())]
