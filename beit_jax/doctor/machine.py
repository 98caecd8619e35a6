"""The machine: its devices, whether the batch divides over them, whether the state fits."""

import contextlib
import math
import os
import pathlib

import jax

from beit_jax import jobs
from beit_jax.distributed import cluster
from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, warning, wrong
from beit_jax.storage import size
from beit_jax.training.room import tree_bytes

# Files of accelerators, and what JAX needs to use them.
_HARDWARE = {
    "/dev/nvidia0": "a GPU",
    "/dev/accel0": "a TPU",
    "/dev/vfio/0": "a TPU",
}
_PLENTY = 0.9  # of the memory; above it a run is close to the edge


def check_devices(context: Context) -> list[Finding]:
    """JAX runs on the platform that is asked for, and on the accelerator that is there."""
    cluster.check_platform(context.platform)
    platform, devices = jax.default_backend(), jax.devices()
    jobs.check_platform(context.config, platform=platform)
    memory = device_bytes()
    what = f"{len(devices)} × {devices[0].device_kind} ({platform})"
    what += f" with {size(memory)} each" if memory and platform != "cpu" else ""
    idle = [name for path, name in _HARDWARE.items() if os.path.exists(path)]
    if platform == "cpu" and idle and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        return [
            wrong(
                f"{what}, although this machine has {idle[0]}",
                "pip install 'jax[tpu]' or 'jax[cuda13]', with a driver that matches",
            )
        ]
    return [ok(what)]


def check_batch(context: Context) -> list[Finding]:
    """The batch divides over devices and micro-batches."""
    mesh, run = context.mesh, context.config.run
    return [ok(f"{run.batch_size} images over {mesh.size} devices")]


def device_bytes() -> int:
    """The memory of a device for a program; on a CPU that of the host; 0 where it is not known."""
    stats = jax.devices()[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    return host_bytes() if jax.default_backend() == "cpu" else 0


def host_bytes() -> int:
    """The host's memory, or a container's limit where that is less; 0 where it is not known."""
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):
            found.append(int(pathlib.Path(path).read_text()))
    return min(found, default=0)


def check_memory(context: Context) -> list[Finding]:
    """The train state, gradients, and what a step must keep fit into a device's memory."""
    needed = least_bytes(context)
    return fits(needed, what="at the least", context=context)


def least_bytes(context: Context) -> int:
    """A lower bound of what a step takes on one device, from shapes alone.

    Parameters, optimizer and gradients, what is not trained, and the stream between the blocks,
    which every block keeps for its gradient, whatever is computed again.
    """
    shapes = context.shapes
    total = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((shapes, shapes.params))
    )
    total += tree_bytes(context.small_parts.task.frozen)
    model = getattr(context.config, "model", None)
    if model is not None:
        width = model.width * (4 if model.residual_dtype == "float32" else 2)
        total += context.per_device * (model.tokens + 1) * width * model.layers
    return total


def fits(needed: int, *, what: str, context: Context) -> list[Finding]:
    """Compares what a device needs with what it has.

    Args:
      needed: bytes.
      what: they are: "at the least", say.
      context: of the job.
    """
    available = device_bytes()
    # Simulated devices share the host's memory.
    shared = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    line = f"a step takes {size(needed * shared)} {what}"
    if not available:
        return [ok(f"{line}; how much memory there is, is not known")]
    line += f", of {size(available)}"
    fix = (
        f"a smaller config.run.batch_size, now {context.config.run.batch_size}; a larger"
        " config.optimizer.accumulate, config.model.remat='full', a larger config.run.fsdp, or"
        " more devices"
    )
    if needed * shared > available:
        return [wrong(f"{line}: it does not fit", fix)]
    if needed * shared > _PLENTY * available:
        return [warning(f"{line}: it barely fits", fix)]
    return [ok(line)]
