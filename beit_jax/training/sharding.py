"""The device mesh, and which part of an array each device holds.

Two axes: `data` (batches are split, parameters copied) and `fsdp` (batches are split, and
parameters too). Of several TPU slices `data` is the axis between them, over the data-center
network, and `fsdp` stays inside a slice: gradients cross the network once a step, parameters never.
Rules go by parameter path, outside the models; the first match wins, and a parameter without a rule
is an error that names it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax.config import ConfigError, check
from beit_jax.text_table import text_table
from beit_jax.training.optim import KeyPath, Rules, by_rules, path_name
from beit_jax.types import Batch, HostBatch, PyTree

F = TypeVar("F", bound=Callable[..., Any])

DATA, FSDP = "data", "fsdp"
REPLICATED = PartitionSpec()
BATCH = PartitionSpec((DATA, FSDP))

# Paths under `blocks` have the layer axis first. The big matrices are split along the axis that is
# not contracted with the residual stream where there is a choice; vectors, tokens and tables are
# too small to be worth a collective. Every parameter is listed: a job brings rules for those it
# adds (`Task.sharding_rules`), and one that is forgotten is an error instead of being replicated.
_ENCODER: Rules[PartitionSpec] = (
    (r"blocks/attention/(query|key|value)/kernel$", PartitionSpec(None, None, FSDP)),
    (r"blocks/attention/proj/kernel$", PartitionSpec(None, FSDP, None)),
    (r"blocks/mlp/fc1/kernel$", PartitionSpec(None, None, FSDP)),
    (r"blocks/mlp/fc2/kernel$", PartitionSpec(None, FSDP, None)),
    (r"blocks/(attention/(query|value|proj)|mlp/fc[12])/bias$", REPLICATED),
    (r"blocks/(norm[12]/(scale|bias)|gamma_[12])$", REPLICATED),
    (r"relative_position_bias/table$", REPLICATED),  # shared, or each block's
    (r"patch_embed/kernel$", PartitionSpec(None, None, None, FSDP)),
    (r"patch_embed/bias$", REPLICATED),
    (r"encoder/(cls_token|mask_token|pos_embed|norm/(scale|bias))$", REPLICATED),
)
_HEADS: Rules[PartitionSpec] = (
    (r"(lm_head|head)/kernel$", PartitionSpec(None, FSDP)),
    (r"(lm_head|head)/bias$", REPLICATED),
    (r"fc_norm/(scale|bias)$", REPLICATED),
    (r"probe/(kernel|bias)$", REPLICATED),
)
_SEGMENTERS: Rules[PartitionSpec] = (
    # The number of classes is rarely divisible.
    (r"(head|auxiliary)/classifier/kernel$", PartitionSpec(None, None, FSDP, None)),
    (r"(head|auxiliary)/\w+/conv/kernel$", PartitionSpec(None, None, None, FSDP)),
    (r"neck/(up4/conv[12]|up2/conv)/kernel$", PartitionSpec(None, None, None, FSDP)),
    (r"neck/(up4/conv[12]|up2/conv)/bias$", REPLICATED),
    (r"(neck|head|auxiliary)/(\w+/)?(norm|classifier)/(scale|bias)$", REPLICATED),
)
_TOKENIZERS: Rules[PartitionSpec] = (  # small
    (r"codebook$", REPLICATED),
    (r"(encoder|decoder)/level_\d+/(resample|conv_\d)/(kernel|bias)$", REPLICATED),
    (r"(encoder|decoder)/group_\d/block_\d/(conv_\d|identity)/(kernel|bias)$", REPLICATED),
    (r"(encoder|decoder)/(input|output)/(kernel|bias)$", REPLICATED),
)
SHARDING_RULES: Rules[PartitionSpec] = (
    (r"variables/", REPLICATED),  # of a train state: what no gradient trains is small
    *_ENCODER,
    *_HEADS,
    *_SEGMENTERS,
    *_TOKENIZERS,
    (r"(step|count|skipped|skipped_in_row)$", REPLICATED),  # of a train state
)


def make_mesh(*, fsdp: int, devices: list | None = None) -> Mesh:
    """A mesh of all devices, `[data, fsdp]`.

    Raises:
      ConfigError: `fsdp` does not divide the number of devices, or of a slice's devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    check(n % fsdp == 0, "config.run.fsdp", f"{fsdp} does not divide {n} devices")
    if count_slices(devices) > 1:
        return Mesh(
            arrange_slices(devices, fsdp=fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2
        )
    # A group of 8 on 4 × 4 × 4 chips is half a plane, which JAX makes only where splitting physical
    # axes is allowed.
    grid = mesh_utils.create_device_mesh(
        (n // fsdp, fsdp), devices=devices, allow_split_physical_axes=fsdp > 1
    )
    # Auto on purpose: Explicit, JAX's default now, would put sharding annotations into the models.
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def on_mesh(function: F, mesh: Mesh) -> F:
    """`function`, traced with `mesh` as context, so that kernels in it are mapped over devices."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return cast(F, traced)


def count_slices(devices: list) -> int:
    """How many TPU slices the devices belong to; 1 for devices without slices."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange_slices(devices: list, *, fsdp: int) -> np.ndarray:
    """Devices of several slices as `[data, fsdp]`, slice after slice along `data`.

    Raises:
      ConfigError: `fsdp` does not divide a slice.
    """
    slices = count_slices(devices)
    in_slice = len(devices) // slices
    check(
        in_slice % fsdp == 0,
        "config.run.fsdp",
        f"{fsdp} does not divide the {in_slice} devices of each of {slices} slices",
    )
    return mesh_utils.create_hybrid_device_mesh(
        (in_slice // fsdp, fsdp),
        (slices, 1),
        devices=devices,
        allow_split_physical_axes=fsdp > 1,  # as inside one slice
    )


def shardings(
    tree: PyTree, mesh: Mesh | AbstractMesh, *, rules: Rules[PartitionSpec] = ()
) -> PyTree:
    """A `NamedSharding` for every array of a train state or a parameter tree.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; paths end in parameter paths (an optimizer's moments
        have the path of their parameter behind their own).
      mesh: from `make_mesh`.
      rules: come before `SHARDING_RULES`.

    Raises:
      ValueError: leaves without a rule; all are named.
      ConfigError: an axis that its mesh axis does not divide.
    """
    specs = by_rules(tree, (*rules, *SHARDING_RULES), what="sharding")
    wrong = []

    def sharding(
        path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct, spec: PartitionSpec
    ) -> NamedSharding:
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                wrong.append(f"{path_name(path)} {leaf.shape}: {size} over {mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(sharding, tree, specs)
    if wrong:
        raise ConfigError(f"config.run.fsdp: does not divide {'; '.join(wrong)}")
    return result


def check_batch(
    batch_size: int, *, accumulate: int, mesh: Mesh | AbstractMesh, processes: int
) -> None:
    """Raises ConfigError unless the global batch divides over hosts, devices and micro-batches."""
    devices = mesh.size
    for count, what in (
        (processes, "processes"),
        (devices, "devices"),
        (devices * accumulate, f"devices times config.optimizer.accumulate = {accumulate}"),
    ):
        check(
            batch_size % count == 0,
            "config.run.batch_size",
            f"{batch_size} does not divide over {count} {what}",
        )


def table(shapes: PyTree) -> str:
    """One line for each parameter: its path, shape, split and bytes on a device.

    Args:
      shapes: parameters or their shapes, with shardings (`state_shapes(...).params`).
    """
    header = ("parameter", "shape", "split", "bytes on a device")
    rows = []
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        local = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(local) * leaf.dtype.itemsize
        total += size
        split = ",".join(map(str, leaf.sharding.spec)) or "replicated"
        shape = "×".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_name(path), shape, split, f"{size:,}"))
    return text_table([header, *rows, ("all", "", "", f"{total:,}")], align="lllr")


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every process's values, whole on every device; that processes agree is not checked."""
    everywhere = NamedSharding(mesh, REPLICATED)
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    # device_put would compare the values of all hosts, which takes memory for every host's copy.
    def put(leaf: np.ndarray | jax.Array) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

    return jax.tree.map(put, tree)


def to_host(tree: PyTree) -> PyTree:
    """Whole numpy arrays on every host; all processes must call it together."""

    def fetch(leaf: Any) -> np.ndarray:
        if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def to_devices(batch: HostBatch, mesh: Mesh) -> Batch:
    """This host's part of a batch → global arrays, split over all devices along the first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }
