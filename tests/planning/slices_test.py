"""Google's names, and the machines they stand for."""

import math

import pytest

from beit_jax.config import ConfigError
from beit_jax.planning import slices

# Google's tables (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e): name, topology, chips, hosts.
TABLE = """
v4-8            2x2x1         4     1
v4-16           2x2x2         8     2
v4-32           2x2x4        16     4
v4-64           2x4x4        32     8
v4-128          4x4x4        64    16
v4-256          4x4x8       128    32
v4-512          4x8x8       256    64
v4-1024         8x8x8       512   128
v4-1536         8x8x12      768   192
v4-2048         8x8x16     1024   256
v4-4096         8x16x16    2048   512
v5litepod-1     1x1           1     1
v5litepod-4     2x2           4     1
v5litepod-8     2x4           8     1
v5litepod-16    4x4          16     4
v5litepod-32    4x8          32     8
v5litepod-64    8x8          64    16
v5litepod-128   8x16        128    32
v5litepod-256   16x16       256    64
v5e-256         16x16       256    64
v5p-8           2x2x1         4     1
v5p-16          2x2x2         8     2
v5p-64          2x4x4        32     8
v5p-128         4x4x4        64    16
v5p-256         4x4x8       128    32
v5p-512         4x8x8       256    64
v5p-1024        8x8x8       512   128
v5p-2048        8x8x16     1024   256
v5p-4096        8x16x16    2048   512
v5p-8192        16x16x16   4096  1024
v5p-12288       16x16x24   6144  1536
v6e-1           1x1           1     1
v6e-8           2x4           8     1
v6e-16          4x4          16     4
v6e-256         16x16       256    64
"""


def test_shapes_and_hosts_equal_googles_table():
    for line in TABLE.strip().splitlines():
        name, topology, chips, hosts = line.split()
        tpu_slice = slices.parse_slice(name)
        assert "x".join(map(str, tpu_slice.shape)) == topology, name
        assert (tpu_slice.chips, tpu_slice.hosts) == (int(chips), int(hosts)), name
        assert tpu_slice.chips // tpu_slice.hosts == math.prod(tpu_slice.host_bounds)
        assert tpu_slice.vcpus > 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("v4", "no TPU slice"),
        ("h100-8", "no TPU slice"),
        ("v3-8", "no TPU slice"),
        ("v4-9", "there is no 'v4-9'"),
        ("v4-12", "v4-8, v4-16"),
        ("v5litepod-12", "v5litepod-8, v5litepod-16"),
        ("v6e-512", "v6e-256"),
        ("v4-8192", "v4-4096"),
        ("", "no slice is named"),
    ],
)
def test_unknown_slices_are_refused_with_the_names_that_exist(name, part):
    with pytest.raises(ConfigError, match="--plan: ") as error:
        slices.parse_slices(name)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_several_names_are_separated_by_commas():
    assert [found.name for found in slices.parse_slices("v4-8, v6e-8,")] == ["v4-8", "v6e-8"]


@pytest.mark.parametrize(
    ("name", "links"),
    # Wrap-around gives an axis its second link: from one cube of 64 on, or along an axis of 16.
    [
        ("v4-8", 2),
        ("v4-64", 3),
        ("v4-128", 6),
        ("v5litepod-64", 2),
        ("v5litepod-128", 3),
        ("v6e-256", 4),
        ("v6e-1", 0),
    ],
)
def test_links_that_a_collective_can_use(name, links):
    assert slices.parse_slice(name).links == links


def test_peaks_equal_the_data_sheets():
    peaks = {name: chip.peak / 1e12 for name, chip in slices.CHIPS.items()}
    assert peaks == {"v4": 275, "v5litepod": 197, "v5p": 459, "v6e": 918}


@pytest.mark.parametrize(
    "name",
    [
        "v4-08",
        "v4-" + "9" * 5000,
        "v4-٨",
        "v4--8",
        "v4-1e3",
        "v4-8\n8",
        "\x1b[2J",
        "v" * 10**6,
        "v4-0",
    ],
)
def test_a_hostile_name_is_refused_in_one_line(name):
    with pytest.raises(ConfigError, match="--plan: ") as caught:
        slices.parse_slices(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
