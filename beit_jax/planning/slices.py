"""TPU slices by Google's names: chips, shapes, hosts, and the chips' capabilities.

parse_slice("v4-128")  # 64 chips of TPU v4, 4 × 4 × 4, 16 hosts
"""

import dataclasses
import functools
import itertools
import math
import re

from beit_jax.config import ConfigError, check
from beit_jax.config.parse import shown
from beit_jax.hardware import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU generation. Sources: Google's TPU documentation, libtpu's messages.

    Attributes:
      device_kind: as JAX names it; `hardware.PEAK_FLOPS` has its peak.
      topology: libtpu's name for the family.
      config_name: libtpu's name for two cores working as one device; "" where a chip is one core.
      cores_per_chip: the number in the accelerator's name, divided by chips.
      axes: of the interconnect, 3 or 2.
      largest: chips of the largest slice.
      hbm: bytes a program may use, from the compiler's message when it runs out.
      hbm_bandwidth: bytes/s.
      clock: Hz; `estimated_cycles` are cycles of it.
      link: bytes/s of one interconnect link in one direction.
      vcpus: vCPUs of a host, by its number of chips.
    """

    device_kind: str
    topology: str
    config_name: str
    cores_per_chip: int
    axes: int
    largest: int
    hbm: float
    hbm_bandwidth: float
    clock: float
    link: float
    vcpus: dict[int, int]

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.device_kind]


CHIPS = {
    "v4": Chip(
        device_kind="TPU v4",
        topology="v4",
        config_name="megacore",
        cores_per_chip=2,
        axes=3,
        largest=2048,
        hbm=30.75 * GIB,
        hbm_bandwidth=1200e9,
        clock=1050e6,
        link=45e9,
        vcpus={4: 240},
    ),
    "v5litepod": Chip(
        device_kind="TPU v5 lite",
        topology="v5e",
        config_name="",
        cores_per_chip=1,
        axes=2,
        largest=256,
        hbm=15.75 * GIB,
        hbm_bandwidth=819e9,
        clock=1500e6,
        link=45e9,
        vcpus={1: 24, 4: 112, 8: 224},
    ),
    "v5p": Chip(
        device_kind="TPU v5p",
        topology="v5p",
        config_name="megacore",
        cores_per_chip=2,
        axes=3,
        largest=6144,
        hbm=95.73 * GIB,
        hbm_bandwidth=2765e9,
        clock=1750e6,
        link=90e9,
        vcpus={4: 208},
    ),
    "v6e": Chip(
        device_kind="TPU v6e",
        topology="v6e",
        config_name="",
        cores_per_chip=1,
        axes=2,
        largest=256,
        hbm=31.24 * GIB,
        hbm_bandwidth=1638e9,
        clock=1750e6,
        link=90e9,
        vcpus={1: 44, 4: 180, 8: 180},
    ),
}
ALIASES = {"v5e": "v5litepod", "v5lite": "v5litepod"}
NAMES = (
    "v4-8 … v4-4096 and v5p-8 … v5p-12288 (the number counts TensorCores, two on a chip),"
    " v5litepod-1 … v5litepod-256 (or v5e-…) and v6e-1 … v6e-256 (chips)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A slice by Google's name.

    Attributes:
      name: as given, "v4-128".
      chip: its generation.
      shape: chips along each axis, (4, 4, 4).
      host_bounds: chips of one host along x, y and z.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    host_bounds: tuple[int, int, int]

    @property
    def chips(self) -> int:
        """JAX devices: one per chip."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines; every one runs a process."""
        return self.chips // math.prod(self.host_bounds)

    @property
    def vcpus(self) -> int:
        """vCPUs of one host."""
        return self.chip.vcpus[math.prod(self.host_bounds)]

    @property
    def links(self) -> int:
        """Links of a chip that a collective over the whole slice can use.

        Two along an axis that wraps around, else one: v4 and v5p wrap where all axes are multiples
        of 4, v5e and v6e along axes of 16.
        """
        if self.chip.axes == 3:
            wraps = [all(size % 4 == 0 for size in self.shape)] * 3
        else:
            wraps = [size == 16 for size in self.shape]
        return sum(1 + wrap for size, wrap in zip(self.shape, wraps, strict=True) if size > 1)


def parse_slice(name: str) -> Slice:
    """A slice from Google's name for it.

    The shape is Google's default for that number of chips: the one most like a cube.

    Raises:
      ConfigError: there is no such name; the message lists the names that exist.
    """
    found = re.fullmatch(r"(v\w{1,20})-([1-9][0-9]{0,6})", name.strip())
    family = ALIASES.get(found.group(1), found.group(1)) if found else ""
    if found is None or family not in CHIPS:
        raise ConfigError(
            f"--plan: {shown(name)} is no TPU slice this project knows; there are {NAMES}"
        )
    chip, number = CHIPS[family], int(found.group(2))
    chips, rest = divmod(number, chip.cores_per_chip)
    sizes = _shapes_2d(chip) if chip.axes == 2 else _shapes_3d(chip)
    if rest or chips not in sizes:
        counted = [count * chip.cores_per_chip for count in sorted(sizes)]
        some = [f"{family}-{count}" for count in counted if count & (count - 1) == 0]
        raise ConfigError(f"--plan: there is no {name!r}; of this family, {', '.join(some)} …")
    shape = sizes[chips]
    if chips == 1:
        bounds = (1, 1, 1)
    elif chip.axes == 2 and chips == 8:  # all eight chips on one host
        bounds = (2, 4, 1)
    else:
        bounds = (2, 2, 1)
    return Slice(name=name.strip(), chip=chip, shape=shape, host_bounds=bounds)


def parse_slices(names: str) -> list[Slice]:
    """Slices from names with commas between them.

    Raises:
      ConfigError: there is no such slice, or no name at all.
    """
    check(bool(names.strip(" ,")), "--plan", f"no slice is named; there are {NAMES}")
    return [parse_slice(name) for name in names.split(",") if name.strip()]


def _shapes_2d(chip: Chip) -> dict[int, tuple[int, ...]]:
    shapes = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    return {math.prod(shape): shape for shape in shapes if math.prod(shape) <= chip.largest}


@functools.cache
def _shapes_3d_up_to(largest: int) -> dict[int, tuple[int, ...]]:
    sizes = (2, *range(4, 33, 4))
    best: dict[int, tuple[int, ...]] = {4: (2, 2, 1)}
    for shape in itertools.combinations_with_replacement(sizes, 3):
        # Beyond one cube of 64, slices are made of whole cubes.
        if math.prod(shape) > 64 and any(size % 4 for size in shape):
            continue
        count = math.prod(shape)
        if count <= largest and sum(shape) < sum(best.get(count, (100,))):
            best[count] = shape
    return best


def _shapes_3d(chip: Chip) -> dict[int, tuple[int, ...]]:
    return _shapes_3d_up_to(chip.largest)
