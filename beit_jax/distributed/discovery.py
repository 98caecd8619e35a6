"""Finds out which process this is, of how many, and where process 0 listens."""

import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping

from beit_jax.config import check, one_of
from beit_jax.config.bounds import ADDRESS, Within
from beit_jax.config.parse import shown

MOST_PROCESSES = 1_000_000
SECONDS = Within(gt=0, le=31_536_000)  # a year


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How processes find each other, the platform they must run on, and how long they wait.

    Attributes:
      multihost: "auto" joins a cluster where one is found or an address is given; "yes" makes it an
        error if there is none; "no" runs a process on its own whatever is around it.
      coordinator_address: host:port of process 0; "" takes JAX_COORDINATOR_ADDRESS, or the
        cluster's.
      num_processes: 0 takes JAX_NUM_PROCESSES, or the cluster's.
      process_id: -1 takes JAX_PROCESS_ID, or the cluster's.
      platform: "tpu", "gpu" or "cpu" makes any other platform an error; "any" accepts all.
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

    def __post_init__(self) -> None:
        one_of(self.multihost, "--multihost", "auto", "yes", "no")
        one_of(self.platform, "--platform", "any", "tpu", "gpu", "cpu")
        for name in ("start_timeout", "heartbeat_timeout", "barrier_timeout"):
            SECONDS.check(getattr(self, name), f"--{name}")
        Within(ge=0, le=MOST_PROCESSES).check(self.num_processes, "--num_processes")
        Within(ge=-1, le=MOST_PROCESSES).check(self.process_id, "--process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """A process' part in a cluster.

    Attributes:
      address: where process 0 listens, host:port.
      count: processes in all.
      index: this process, from 0.
      local_device_ids: the devices of this process where several share a host; None for all.
    """

    address: str
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None


def find_membership(
    settings: Settings, environment: Mapping[str, str] = os.environ
) -> Membership | None:
    """This process' part in a cluster, from the settings, JAX's variables or the surroundings.

    Returns:
      The membership; None for a process on its own.

    Raises:
      ConfigError: a cluster was asked for and there is none, or its description is incomplete.
    """
    if settings.multihost == "no":
        return None
    address = settings.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    count = settings.num_processes or _whole_number(environment, "JAX_NUM_PROCESSES")
    index = _whole_number(environment, "JAX_PROCESS_ID")
    if settings.process_id >= 0:
        index = settings.process_id
    local_device_ids = None
    # A flag that has an effect in a cluster alone asks for one: no run is alone by mistake.
    several = settings.num_processes > 1 or settings.process_id > 0
    asked = address is not None or settings.multihost == "yes" or several
    if None in (address, count, index) and (asked or _cluster_around(environment)):
        # JAX's own knowledge of Cloud TPU, GKE, Slurm, Open MPI and Kubernetes, which a bare
        # jax.distributed.initialize() asks. It has no public name.
        from jax._src.clusters import ClusterEnv

        address, count, index, local_device_ids = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, int(settings.start_timeout)
        )
    if address is None or count is None or index is None:
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
            "--num_processes" if several else "--multihost",
            f"no cluster that JAX knows is here, and not given: {', '.join(missing)}",
        )
        return None
    ADDRESS.check(address, "--coordinator_address")
    check(0 <= index < count, "--process_id", f"{index} is not one of {count}")
    if count == 1 and settings.multihost != "yes":
        return None
    return Membership(
        address=address,
        count=count,
        index=index,
        local_device_ids=tuple(local_device_ids) if local_device_ids else None,
    )


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    number = re.fullmatch("[0-9]{1,7}", value) is not None
    check(number, name, f"must be a number of at most 7 digits, got {shown(value)}")
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
