"""Pickles and zips out of all proportion are refused; what checkpoints hold is read."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from beit_jax.weights import containers, pickles
from beit_jax.weights.report import WeightsError
from beit_jax.weights.unpickler import Unpickler
from tests.faults import hostile_files

REFUSED = {
    "lists": "nested too deep",
    "tuples": "nested too deep",
    "a deep key": "nested too deep",
    "a wide key": "a key that is a",
    "deep dicts": "nested too deep",
    "keys that collide": "hash alike",
    "many numbers": "keys that are not strings",
    "a set that collides": "hash alike",
    "set() that collides": "hash alike",
    "pairs that collide": "hash alike",
    "bytearray of 2^50": "EOFError",
    "range": "a dict of range",
    "set of a range": "a set of range",
    "extension": "an opcode that torch.save does not write",
    "a buffer": "an opcode that torch.save does not write",
    "no such opcode": "invalid load key",
    "state of a class": "a state for a type",
    "a name of a million": "a name too long",
    "many names": "too many of them",
    "many copies": "the same values again and again",
    "dicts of dicts of dicts": "the same values again and again",
    "tensor of 10^30": "ends behind its 1 numbers",
    "negated tensor of one number": "repeats its numbers",
    "os.system": "refused: it names posix.system",
    "through a path": "refused: it names collections._sys",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_files.pickles(tmp_path_factory.mktemp("canary") / "canary")


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("container", [hostile_files.torch_zip, hostile_files.torch_stream])
def test_what_is_out_of_proportion_is_refused_for_that(hostile, kind, container):
    if kind.startswith(("tensor", "negated")) and container is hostile_files.torch_stream:
        pytest.skip("its storages are others")
    with pytest.raises(WeightsError) as caught:
        pickles.loads(container(hostile[kind]), source="x.pth")
    assert REFUSED[kind] in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_checkpoints_hold_is_read():
    """As many keys as labels of ImageNet-22k, an optimizer's state for each parameter, nesting."""
    deep = 0
    for _ in range(100):
        deep = {"a": [deep], "b": (deep,)} if deep == 0 else [deep]
    whole = {
        "labels": {number: f"label {number}" for number in range(21_842)},
        "state": {number: {"step": 1.0, 0: number} for number in range(500)},
        "groups": [{"params": list(range(2000)), "betas": (0.9, 0.999)}] * 20,
        "pairs": OrderedDict((f"key {i}", i) for i in range(3000)),
        "set": {1, 2, (3, ("a", 4.0)), frozenset()} - {frozenset()},
        "history": [0.5] * 100_000,
        "bytes": bytes(1000),
        "deep": deep,
    }
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps(whole, protocol)
        assert Unpickler(io.BytesIO(content)).load() == whole


def test_a_zip_is_not_unpacked_to_many_times_its_size():
    bomb = hostile_files.zip_of({"a.pth": bytes(100 << 20)}, kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="unpacked it would have 104857600 bytes"):
        containers.load(bomb, source="a.zip")


def test_tensors_may_share_numbers_but_not_without_end(monkeypatch):
    array = np.zeros((100, 100), np.float32)
    state = dict.fromkeys("abcd", array)
    containers.check_size(state, file_size=array.nbytes, source="x")
    monkeypatch.setattr(containers, "_COPIED_ANYHOW", 0)
    with pytest.raises(WeightsError, match=r"x has 10 bytes, its tensors 160000"):
        containers.check_size(state, file_size=10, source="x")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "n" * 501, "a\0"])
def test_a_tensor_has_a_name_of_one_line(name):
    with pytest.raises(WeightsError, match="holds a tensor that is called") as caught:
        containers.check_names(["good.weight", name], source="x")
    assert str(caught.value).isprintable()


def test_a_message_is_one_line_whatever_is_in_the_file():
    error = WeightsError("x: a\nb\x1b[2J\udcff " + "y" * 10_000)
    assert str(error).isprintable()
    assert str(error).startswith("x: a\\nb\\x1b[2J\\udcff y")
    assert len(str(error)) < 4100
