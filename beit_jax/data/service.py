"""Past one host's cores: other machines decode and augment, in the order the run wants.

    python -m beit_jax.data.service --port=5050 --address=NAME     # on each helping machine
    python main.py --config=... '--config.data.service=("NAME:5050", "OTHER:5050")' \\
        --config.data.workers=64                                   # cores of a helping machine

Each command is a tf.data service of its own, a dispatcher and one worker. A training host sends to
each of its services the pipeline of every n-th of its batches, n services in turn, and takes them
back in turn. So a batch is still a function of (seed, step): the same as without the service, bit
for bit on the same kind of processor, and a run resumes as ever. (Workers that share one
dispatcher would deliver in whatever order they finish; that's why there is one of each.)

With s services and h training hosts, host i uses services i, i + h, ...; where there are fewer
services than hosts, several hosts share one and each gets a part of its cores.

What it takes: the source's files under the same path on the helping machines (gs://, NFS), the same
version of TensorFlow, and a source whose records TensorFlow reads itself with random access
("embedded", "folder"): ArrayRecord is read by Python, which does not travel. About 0.2 MB an image
cross the network. Held-out images are read on the training hosts.

When a service dies the run waits for it; when it comes back it has forgotten its place, the run
says so and ends, and the same command continues it.
"""

import argparse
import dataclasses
import itertools
import socket
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, RunError

TIMEOUT = 10.0  # seconds until a service that doesn't answer is taken for missing
AHEAD = 2  # batches asked of a service before they are needed

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Service:
    """A running service; it ends with the object.

    Attributes:
      address: host:port, for `config.data.service`.
      dispatcher, worker: tf.data's servers.
    """

    address: str
    dispatcher: tf.data.experimental.service.DispatchServer
    worker: tf.data.experimental.service.WorkerServer


def serve(*, port: int = 0, address: str = "localhost") -> Service:
    """Starts a service.

    Args:
      port: of the dispatcher; the worker takes the next one. 0: any two.
      address: this machine's name as the training hosts know it.
    """
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=port))
    found = int(dispatcher.target.rsplit(":", 1)[1])
    worker = service.WorkerServer(
        service.WorkerConfig(
            dispatcher_address=f"localhost:{found}",
            # tf.data replaces %port% by the port it got.
            worker_address=f"{address}:%port%",
            port=port + 1 if port else 0,
            heartbeat_interval_ms=1000,
        )
    )
    return Service(f"{address}:{found}", dispatcher, worker)


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
) -> Iterator[Batch]:
    """Batches from `start_step` on, made by services in turn.

    Args:
      make: from a dataset of steps (int64) to that of their batches, one each.
      addresses: of `assigned`.
      start_step: the first batch's step.

    Raises:
      ConfigError: a service doesn't answer.
      RunError: a service lost its place.
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
    turns: list[Iterator], *, addresses: tuple[str, ...], start_step: int
) -> Iterator[Batch]:
    for step in itertools.count(start_step):
        place = (step - start_step) % len(turns)
        try:
            number, batch = next(turns[place])
        except (tf.errors.OpError, StopIteration) as error:
            raise RunError(
                f"config.data.service: {addresses[place]} gave no batch for step {step}:"
                f" {str(error).splitlines()[0] if str(error) else 'it has no more'}"
            ) from error
        if number != step:
            raise RunError(
                f"config.data.service: {addresses[place]} gave the batch of step {number} for step"
                f" {step}: it was started again; the same command continues the run"
            )
        yield batch


def _check_answers(address: str) -> None:
    """tf.data itself would ask again for an hour."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.data.service: no answer from {address!r} ({error}); is"
            " `python -m beit_jax.data.service` running there?"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.data.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=5050, help="this one and the next")
    parser.add_argument("--address", default=socket.getfqdn(), help="name of this machine")
    options = parser.parse_args(arguments)
    service = serve(port=options.port, address=options.address)
    print(f"serving; --config.data.service='(\"{service.address}\",)'", file=sys.stderr, flush=True)
    service.worker.join()


if __name__ == "__main__":
    main()
