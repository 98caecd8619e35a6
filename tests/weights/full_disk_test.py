"""Writing over what is there loses it on no disk."""

import errno

import numpy as np
import orbax.checkpoint as ocp
import pytest

from beit_jax.storage import StorageError
from beit_jax.weights import native


def params(value):
    return {"w": np.full((3, 4), value, np.float32)}


def test_an_old_checkpoint_stays_where_the_new_one_finds_no_room(tmp_path, monkeypatch):
    path = tmp_path / "imported"
    native.write_params(str(path), params(1), config={"a": 1})
    original = ocp.Checkpointer.save

    def half(self, directory, *arguments, **named):
        original(self, directory, *arguments, **named)
        directory.rename(f"{directory}.orbax-checkpoint-tmp")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", half)
    with pytest.raises(StorageError, match=r"imported: the disk is full \(48 bytes needed, "):
        native.write_params(str(path), params(2), config={"a": 2})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["imported"]
    assert native.read_params(str(path))["w"][0, 0] == 1
    native.write_params(str(path), params(3), config={"a": 3})
    assert native.read_params(str(path))["w"][0, 0] == 3
    assert native.saved_config(str(path)) == {"a": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["imported"]


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "imported"
    native.write_params(str(path), params(1), config={})

    def refused(*arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "state/d/ab"))

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", refused)
    with pytest.raises(PermissionError):
        native.read_params(str(path))
