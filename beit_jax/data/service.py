"""Other machines decode and augment where a host has too few cores, in the order the run asks for.

    python -m beit_jax.data.service --port=5050 --address=NAME --allow=10.0.0.0/8   # on each helper
    python main.py --config=... '--config.data.service=("NAME:5050", "OTHER:5050")' \\
        --config.data.workers=64                                   # cores of a helping machine

Every command starts a separate tf.data service: a dispatcher and one worker. A training host with n
services sends each of them the pipeline of every n-th batch, and collects the batches in turn. A
batch therefore remains a function of (seed, step): it is the same as without the service, bit for
bit on the same kind of processor, and a run resumes as before. (Workers that share one dispatcher
would deliver in whatever order they finish, which is why every dispatcher has only one.)

With s services and h training hosts, host i uses services i, i + h, and so on. Where there are
fewer services than hosts, several hosts share one, and each gets a part of its cores.

Requirements: the source's files under the same path on the helping machines (gs://, NFS), the same
version of TensorFlow, and a source that TensorFlow itself reads with random access ("embedded",
"folder"). ArrayRecord files are read by Python, which can't be sent to another process. An image
takes about 0.2 MB of network traffic. Held-out images are read on the training hosts.

A service does what it is told by anybody who can reach its ports, which is to run TensorFlow graphs
and so to read and write files. Without `--allow` that is this machine alone; the machines named
there are the training hosts. Nothing is encrypted.

When a service dies the run waits for it. A service that comes back has lost its position; the run
then says so and ends, and the same command continues it.
"""

import argparse
import dataclasses
import itertools
import re
import socket
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, RunError
from beit_jax.config.parse import shown
from beit_jax.data import (
    decode,  # noqa: F401  (a service needs its Python function, see there)
    label_maps,  # noqa: F401  (and this one's)
    peers,
)
from beit_jax.types import HostBatch

TIMEOUT = 10.0  # seconds until a service that doesn't answer counts as missing
AHEAD = 2  # batches requested from a service before they are needed


@dataclasses.dataclass(frozen=True)
class Service:
    """A running service, which ends when this object is deleted.

    Attributes:
      address: host:port, for `config.data.service`.
      dispatcher, worker: tf.data's servers.
    """

    address: str
    dispatcher: tf.data.experimental.service.DispatchServer
    worker: tf.data.experimental.service.WorkerServer


def serve(*, port: int = 0, address: str = "localhost", allow: str = "") -> Service:
    """Starts a service.

    Args:
      port: of the dispatcher; the worker takes the next one. 0 takes any two free ports.
      address: the name by which training hosts reach this machine.
      allow: who may use it beside this machine, for `peers.parse_networks`.

    Raises:
      ConfigError: `allow` names no networks, or a port is taken.
    """
    networks = peers.parse_networks(allow)
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=port), start=False)
    dispatcher_port = _started(dispatcher, networks)
    worker = service.WorkerServer(
        service.WorkerConfig(
            dispatcher_address=f"localhost:{dispatcher_port}",
            # tf.data replaces %port% by the port that it got.
            worker_address=f"{address}:%port%",
            port=port + 1 if port else 0,
            heartbeat_interval_ms=1000,
        ),
        start=False,
    )
    _started(worker, networks)
    return Service(f"{address}:{dispatcher_port}", dispatcher, worker)


def _started(
    server: tf.data.experimental.service.DispatchServer | tf.data.experimental.service.WorkerServer,
    networks: tuple[peers.Network, ...] | None,
) -> int:
    """Starts one of tf.data's servers, closes its port to strangers, and returns the port."""
    try:
        server.start()
    except Exception as error:  # RuntimeError where the port is taken
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"--port: no service there: {reason}") from error
    address = server.target if hasattr(server, "target") else server._address
    port = int(address.rsplit(":", 1)[1])
    if networks is not None:
        peers.guard(port, networks)
    return port


def assigned(addresses: tuple[str, ...], *, shard: int, shards: int) -> tuple[str, ...]:
    """The services that training host `shard` of `shards` uses, in turn."""
    if len(addresses) >= shards:
        return addresses[shard::shards]
    return (addresses[shard % len(addresses)],)


def batches(
    make: Callable[[tf.data.Dataset], tf.data.Dataset],
    *,
    addresses: tuple[str, ...],
    start_step: int,
) -> Iterator[HostBatch]:
    """Batches from `start_step` on, made by services in turn.

    Args:
      make: a function from a dataset of steps (int64) to the dataset of their batches.
      addresses: as `assigned` returns them.
      start_step: the first batch's step.

    Raises:
      ConfigError: a service doesn't answer.
      RunError: a service lost its position.
    """
    turns = []
    for turn, address in enumerate(addresses):
        _check_answers(address)
        steps = tf.data.Dataset.counter(start_step + turn, len(addresses), dtype=tf.int64)
        numbered = tf.data.Dataset.zip((steps, make(steps)))
        remote = numbered.apply(
            tf.data.experimental.service.distribute(
                processing_mode=tf.data.experimental.service.ShardingPolicy.OFF,
                service=f"grpc://{address}",
                max_outstanding_requests=AHEAD,
                compression=None,  # pixels hardly get smaller
            )
        )
        turns.append(remote.as_numpy_iterator())
    logging.info("batches are made by %s", ", ".join(addresses))
    return _in_turn(turns, addresses=addresses, start_step=start_step)


def _in_turn(
    turns: list[Iterator[tuple[np.ndarray, HostBatch]]],
    *,
    addresses: tuple[str, ...],
    start_step: int,
) -> Iterator[HostBatch]:
    for step in itertools.count(start_step):
        turn = (step - start_step) % len(turns)
        try:
            number, batch = next(turns[turn])
        except (tf.errors.OpError, StopIteration) as error:
            raise RunError(
                f"config.data.service: {addresses[turn]} gave no batch for step {step}:"
                f" {str(error).splitlines()[0] if str(error) else 'it has no more'}"
            ) from error
        if number != step:
            raise RunError(
                f"config.data.service: {addresses[turn]} gave the batch of step {number} for step"
                f" {step}: it was started again; the same command continues the run"
            )
        yield batch


def _check_answers(address: str) -> None:
    """Raises ConfigError unless a service answers; tf.data itself would retry for an hour."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.data.service: no answer from {address!r} ({error}); is"
            " `python -m beit_jax.data.service` running there?"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Serves until the process is stopped; returns the exit code.

    Args:
      arguments: of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.data.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=5050, help="this one and the next")
    parser.add_argument("--address", default="", help="name of this machine for training hosts")
    parser.add_argument(
        "--allow",
        default="",
        help='training hosts: networks, addresses or names, with commas between them; "any" for'
        " everybody who can reach the port (default: this machine alone)",
    )
    options = parser.parse_args(arguments)
    name = options.address or (socket.getfqdn() if options.allow else "localhost")
    try:
        if not 0 <= options.port < 65_535:
            raise ConfigError(f"--port: must be 0 to 65534, got {shown(options.port)}")
        if not re.fullmatch(r"[\w.:-]{1,253}|\[[0-9A-Fa-f:.]+\]", name):
            raise ConfigError(f"--address: {shown(name)} is no host's name")
        service = serve(port=options.port, address=name, allow=options.allow)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    who = options.allow or "this machine alone; --allow=NETWORK,... lets training hosts in"
    print(f"serving {who}", file=sys.stderr)
    print(f"--config.data.service='(\"{service.address}\",)'", file=sys.stderr, flush=True)
    service.worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
