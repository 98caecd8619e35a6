"""Many hosts as one run: found, introduced to each other, watched, and ended together.

    cluster.start(cluster.Settings(platform="tpu"), config=config, workdir=workdir)
    ...
    if cluster.preemption_point():  # all hosts call it equally often and get the same answer
        save()
        raise cluster.Preempted(step)
    ...
    cluster.end(code=0)

It adds to `jax.distributed`:

- Before JAX connects, all processes say hello to process 0 on the coordinator's port. Missing
  processes are named when the time is up, and hosts that differ in settings, code or library
  versions are refused by name (`handshake`).
- A watcher in every process ends it within seconds of another one's failure, and within
  `heartbeat_timeout` of another one's silence, with one line that names the host (`watchdog`).
- SIGTERM (a preempted machine) becomes an answer of `preemption_point`; a process that has nothing
  to save yet leaves at once. A second SIGTERM always ends the process at once.

Exit codes: 0 done; 2 a setting is wrong, or hosts disagree; 69 (EX_UNAVAILABLE) a host is missing
or lost; 74 (EX_IOERR) a disk is full or can't be used; 75 (EX_TEMPFAIL) preempted, the same command
continues the run; 1 anything else.

Without `start`, and with one process, these functions are no-ops that return at once.
"""

import os
import socket
from collections.abc import Mapping

import jax
from absl import logging

from beit_jax.config import ConfigError
from beit_jax.distributed import watchdog
from beit_jax.distributed.collectives import barrier, check_agreement, gather
from beit_jax.distributed.discovery import Membership, Settings, find_membership
from beit_jax.distributed.handshake import describe_process, introduce
from beit_jax.distributed.session import (
    EXIT_LOST,
    EXIT_PREEMPTED,
    EXIT_SETTINGS,
    ClusterError,
    Preempted,
    session,
)
from beit_jax.distributed.versions import code_version, library_versions
from beit_jax.distributed.watchdog import end, preemption_point, set_running
from beit_jax.types import Json

__all__ = (
    "EXIT_LOST",
    "EXIT_PREEMPTED",
    "EXIT_SETTINGS",
    "ClusterError",
    "Preempted",
    "Settings",
    "barrier",
    "check_agreement",
    "check_platform",
    "code_version",
    "end",
    "gather",
    "library_versions",
    "preemption_point",
    "set_running",
    "start",
)

# Variables of machines that have a TPU; a run there is not meant for the CPU.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def start(settings: Settings, *, config: Mapping[str, Json], workdir: str) -> None:
    """Joins the cluster, if there is one, and checks the hosts' agreement and the platform.

    Call it once, from the main thread, before anything touches a device.

    Args:
      settings: see `Settings`.
      config: the resolved config; it must be the same on all hosts.
      workdir: the run's directory; also the same.

    Raises:
      ConfigError: hosts disagree, or this is not the platform that was expected.
      ClusterError: a process is missing or does not answer within `settings.start_timeout`.
    """
    session.settings = settings
    session.hosts = (socket.gethostname(),)
    watchdog.take_sigterm()
    member = find_membership(settings)
    if member is not None:
        facts = describe_process(config=config, workdir=workdir)
        session.hosts = introduce(member, facts, timeout=settings.start_timeout)
        session.index = member.index
        _connect(member, settings)
    check_platform(settings.platform)
    _log_process()


def _connect(member: Membership, settings: Settings) -> None:
    """Joins JAX's cluster and starts to watch the other processes."""
    session.distributed = True
    watchdog.explain_abort()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        member.address,
        member.count,
        member.index,
        local_device_ids=member.local_device_ids,
        # Introductions are over: a process that is late now has died since.
        initialization_timeout=int(max(settings.start_timeout, 1)),
        # The watcher is faster and says more; this is for when it cannot.
        heartbeat_timeout_seconds=int(2 * settings.heartbeat_timeout + 10),
        shutdown_timeout_seconds=int(max(settings.barrier_timeout, 1)),
    )
    watchdog.chain_sigterm()
    watchdog.start_watching()


def check_platform(expected: str, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that JAX runs on the expected platform.

    Args:
      expected: "tpu", "gpu", "cpu"; or "any". With "any", a machine that says it has a TPU is
        expected to use it, unless JAX_PLATFORMS names a platform.
      environment: the environment variables.

    Raises:
      ConfigError: JAX runs on something else.
    """
    reason = f"--platform={expected}"
    if expected == "any":
        variables = [name for name in TPU_VARIABLES if environment.get(name)]
        if not variables or environment.get("JAX_PLATFORMS"):
            return
        expected, reason = "tpu", f"{variables[0]} is set"
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that cannot be opened
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


def _log_process() -> None:
    """Logs one line: which process of how many this is, its host, devices and versions."""
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
