"""The device mesh, and which part of each array every device holds.

Two axes: `data` (batches are split, parameters copied) and `fsdp` (batches are split and
parameters too). Rules go by parameter path, outside the models; the first match wins and a
parameter without a rule is an error.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax.config import check
from beit_jax.training.optim import by_rules, path_name

DATA, FSDP = "data", "fsdp"
REPLICATED = PartitionSpec()
BATCH = PartitionSpec((DATA, FSDP))

# Paths under `blocks` have the layer axis first. The big matrices are split along the axis that is
# not contracted with the residual stream where there is a choice; vectors, tokens and tables are
# too small to be worth a collective.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/attention/(query|key|value)/kernel$", PartitionSpec(None, None, FSDP)),
    (r"blocks/attention/proj/kernel$", PartitionSpec(None, FSDP, None)),
    (r"blocks/mlp/fc1/kernel$", PartitionSpec(None, None, FSDP)),
    (r"blocks/mlp/fc2/kernel$", PartitionSpec(None, FSDP, None)),
    (r"patch_embed/kernel$", PartitionSpec(None, None, None, FSDP)),
    (r"(lm_head|head)/kernel$", PartitionSpec(None, FSDP)),
    (r"(bias|scale|gamma_[12]|cls_token|mask_token|pos_embed|table)$", REPLICATED),
    (r"(encoder|decoder)/.*kernel$", REPLICATED),  # of a dVAE: small
    (r"codebook$", REPLICATED),
    (r"(step|count|skipped|skipped_in_row)$", REPLICATED),
)


def make_mesh(*, fsdp: int, devices: list | None = None) -> Mesh:
    """A mesh of all devices, `[data, fsdp]`.

    Raises:
      ConfigError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    check(n % fsdp == 0, "config.run.fsdp", f"{fsdp} does not divide {n} devices")
    # Auto on purpose: explicit sharding, the default now, would put shardings into the models.
    return jax.make_mesh(
        (n // fsdp, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array of a train state or a parameter tree.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; paths end in parameter paths (an optimizer's moments
        have the path of their parameter behind their own).
      mesh: from `make_mesh`.

    Raises:
      ValueError: a leaf without a rule, or an axis that its mesh axis does not divide.
    """
    specs = by_rules(tree, SHARDING_RULES, what="sharding")
    wrong = []

    def place(path, leaf, spec):
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                wrong.append(f"{path_name(path)} {leaf.shape}: {size} over {mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    placed = jax.tree_util.tree_map_with_path(place, tree, specs)
    if wrong:
        raise ValueError(f"config.run.fsdp does not divide: {'; '.join(wrong)}")
    return placed


def check_batch(batch_size: int, *, accumulate: int, mesh: Mesh, processes: int) -> None:
    """Raises ConfigError unless the global batch divides over hosts, devices and micro-batches."""
    devices = math.prod(mesh.devices.shape)
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


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch → global arrays, split over all devices along the first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }
