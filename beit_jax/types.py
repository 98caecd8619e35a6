"""Names for the types that several packages share.

A pytree of arrays has no precise static type, so these aliases say what a value is for. Signatures
use them instead of a bare `Any`; shapes and dtypes stand in the docstrings.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import numpy as np

# A nested dict of parameters, str → Params or array: what `Functional.init` gives.
Params: TypeAlias = dict[str, Any]
# A nested dict of what a module keeps beside its parameters and no gradient trains: BatchNorm's
# running statistics, a codebook that follows a moving average. {} where there is nothing.
Variables: TypeAlias = dict[str, Any]
# Any pytree of arrays, of ShapeDtypeStructs or of shardings.
PyTree: TypeAlias = Any
# A batch on devices and a batch on the host, by the name of its parts.
Batch: TypeAlias = dict[str, jax.Array]
HostBatch: TypeAlias = dict[str, np.ndarray]
# Sums over a batch; `weight` divides the others. Sums add up over micro-batches, hosts and
# evaluation batches, which means do not.
Sums: TypeAlias = dict[str, jax.Array]
# Parameters as converters see them: "encoder/cls_token" → array.
FlatParams: TypeAlias = Mapping[str, np.ndarray]
# The value of a setting: a bool, int, float or str, a tuple of these, a section, or None. Also the
# default of a dataclass field, which type checkers must take for the field's own type.
Setting: TypeAlias = Any
# What JSON holds, and a JSON object.
Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Any]


class ConfigDataclass(Protocol):
    """Any dataclass: a config, or a section of one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
