"""A digest shows any changed bit, and depends on nothing but the array."""

import json
import random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beit_jax.weights import digests

DTYPES = (np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.float16)


@pytest.fixture(autouse=True)
def small_arrays_are_summed_on_devices_too(monkeypatch):
    monkeypatch.setattr(digests, "_FETCHED", -1)


def digest(array) -> str:
    return digests.of_arrays({"x": array})["x"]


def drawn(shape, dtype) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 256, shape)
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 1, 4), (0, 2)])
def test_host_and_device_have_the_same(dtype, shape):
    array = drawn(shape, dtype)
    assert digest(array) == digest(jnp.asarray(array))


def test_large_arrays_are_summed_in_parts():
    array = drawn((3, 70_001), np.float32)
    assert digest(array) == digest(jnp.asarray(array))


def test_it_does_not_depend_on_how_an_array_is_split():
    array = drawn((16, 24), np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in [(), ("a",), ("b", "a"), (None, "b"), (("a", "b"),)]:
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert digest(placed) == digest(array), spec
    assert digest(np.asfortranarray(array)) == digest(array)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float64, np.int64])
def test_any_one_bit_changes_it(dtype):
    array = drawn((3, 5), dtype)
    before = digest(array)
    for bit in range(8 * array.nbytes):
        altered = np.frombuffer(array.tobytes(), np.uint8).copy()
        altered[bit // 8] ^= 1 << bit % 8
        assert digest(altered.view(array.dtype).reshape(array.shape)) != before, bit


def test_where_an_array_is_summed_makes_no_difference(monkeypatch):
    arrays = {str(size): jnp.arange(size, dtype=jnp.float32) for size in (0, 3, 10, 11, 500)}
    found = []
    for fetched in (-1, 10, 1000):
        monkeypatch.setattr(digests, "_FETCHED", fetched)
        found.append(digests.of_arrays(arrays))
    assert found[0] == found[1] == found[2]
    assert list(found[1]) == list(arrays)


def test_order_and_sign_of_zero_count():
    assert digest(np.array([1.0, 2.0], np.float32)) != digest(np.array([2.0, 1.0], np.float32))
    assert digest(np.float32([0.0])) != digest(np.float32([-0.0]))
    seen = {digest(np.zeros(size, np.float32)) for size in range(50)}
    assert len(seen) == 50


def test_both_halves_are_used():
    """Two arrays in 2³² would agree in one half of their digests, and none of these do."""
    found = [digest(np.full((4,), value, np.int32)) for value in range(300)]
    for half in (slice(0, 8), slice(8, 16)):
        assert len({text[half] for text in found}) == 300


def test_the_value_is_the_same_in_every_version():
    """Old checkpoints are compared with digests that were written long ago."""
    assert digest(np.arange(6, dtype=np.float32).reshape(2, 3)) == "dff8f7125c7407fd"


def test_a_config_is_what_json_makes_of_it():
    assert digests.of_config({"a": (1, 2.5), "b": None}) == digests.of_config(
        json.loads('{"b": null,   "a": [1, 2.5]}')
    )
    assert digests.of_config({"a": 1}) != digests.of_config({"a": 2})


@pytest.fixture
def stored():
    tree = {"params": {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float32)}}
    return tree, digests.item(tree, config={"x": 1})


def test_problems_name_the_array(stored):
    tree, item = stored
    item = json.loads(json.dumps(item))
    assert digests.arrays_problem(item, tree) == ""
    assert digests.arrays_problem(item, tree["params"], part="params/") == ""
    assert digests.arrays_problem(None, {"anything": np.ones(1)}) == ""
    other = {"params": tree["params"] | {"b": np.full((2, 2), -0.0, np.float32)}}
    assert digests.arrays_problem(item, other) == (
        "params/b does not hold the numbers that were saved"
    )
    both = jax.tree.map(lambda leaf: leaf + 1, tree)
    assert digests.arrays_problem(item, both) == (
        "params/a and 1 more arrays do not hold the numbers that were saved"
    )
    wide = {"params": tree["params"] | {"b": np.zeros((2, 3), np.float32)}}
    assert digests.shapes_problem(item, wide) == (
        "params/b is 'float32[2, 3]', and was saved as 'float32[2, 2]'"
    )
    assert digests.shapes_problem(item, {"params": {"a": tree["params"]["a"]}}) == (
        "'params/b' is missing"
    )
    assert "saved" in digests.config_problem(item, {"x": 2})
    assert digests.config_problem(item, {"x": 1}) == ""


def test_one_that_was_written_must_be_there(tmp_path, stored):
    folder = epath.Path(tmp_path)
    assert digests.read(folder) is None
    (folder / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {"state": "x"}}')
    assert digests.read(folder) is None
    (folder / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {"digests": "x"}}')
    with pytest.raises(ValueError, match="its folder digests is missing"):
        digests.read(folder)
    (folder / "digests").mkdir()
    (folder / "digests" / "metadata").write_text(json.dumps(stored[1]))
    assert digests.read(folder) == stored[1]


NONE = (
    *("", "{", "[]", "null", "{}", "[" * 100_000),
    '{"kind": "sums-2", "config": "", "arrays": {}}',
    '{"kind": "sums-1", "config": "", "arrays": {"a": 1}}',
)


@pytest.mark.parametrize("content", NONE, ids=range(len(NONE)))
def test_what_is_no_digest_is_refused(tmp_path, content):
    folder = epath.Path(tmp_path)
    (folder / "digests").mkdir()
    (folder / "digests" / "metadata").write_text(content)
    with pytest.raises(ValueError, match="metadata can't be read"):
        digests.read(folder)


def test_a_random_bit_of_a_random_array_is_never_missed():
    """Larger arrays than the one above, on devices."""
    chance = random.Random(0)
    array = drawn((31, 33), np.float32)
    before = digest(jnp.asarray(array))
    for _ in range(50):
        altered = array.view(np.uint32).copy()
        altered[chance.randrange(31), chance.randrange(33)] ^= np.uint32(1 << chance.randrange(32))
        assert digest(jnp.asarray(altered.view(np.float32))) != before
