"""Files that belong together are never a mixture of old and new ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_jax import files
from beit_jax.config import ConfigError

OLD = {"config.json": b"old", "weights": b"old", "card": b"old"}
NEW = {"config.json": b"new", "weights": b"new", "card": b"new"}
# Ends as a kill does, before the n-th call that changes a name.
KILLED = """
import os, sys
from beit_jax import files
folder, wanted = sys.argv[1], int(sys.argv[2])
calls = 0
def killing(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == wanted:
            os._exit(9)
        return function(*arguments, **options)
    return call
for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, killing(getattr(os, name)))
new = {name: b"new" for name in ("config.json", "weights", "card")}
files.write_together(folder, new, needed_by_all="config.json")
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def test_files_are_made_and_replaced_together(tmp_path):
    folder = tmp_path / "a" / "b"
    for contents in (OLD, NEW):
        files.write_together(folder, contents, needed_by_all="config.json")
        assert content(folder) == contents
    assert sorted(path.name for path in folder.iterdir()) == sorted(NEW)


@pytest.mark.slow
def test_a_kill_leaves_old_files_new_ones_or_no_config(tmp_path):
    seen = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        files.write_together(folder, OLD, needed_by_all="config.json")
        command = [sys.executable, "-c", KILLED, str(folder), str(number)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ)
        found = content(folder)
        assert found in (OLD, NEW) or "config.json" not in found
        seen.append(found)
        if done.returncode == 0:
            break
    assert done.returncode == 0  # there are fewer calls than that
    assert len(seen) > 4
    assert seen[-1] == NEW


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    files.write_together(tmp_path, OLD, needed_by_all="config.json")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(type(files.epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(files.storage.StorageError, match="the disk is full"):
        files.write_together(tmp_path, NEW, needed_by_all="config.json")
    assert content(tmp_path) == OLD


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("photos/café 1.jpg", "photos/café 1.jpg"),
        ("x\n03:00 step 20\r\x1b[31m\x9b.jpg", r"x\n03:00 step 20\r\x1b[31m\x9b.jpg"),
        ("a\u2028b\u202egpj.exe", r"a\u2028b\u202egpj.exe"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_a_name_in_a_message_is_one_line_without_control_characters(name, said):
    assert files.printable(name) == said
    assert files.printable(said) == said


@pytest.mark.parametrize("path", ["https://host/a", "s3://bucket/a", "file:///a"])
def test_an_address_that_nothing_writes_to_is_one_line(path):
    for write in (
        lambda: files.write_whole(path, b""),
        lambda: files.write_together(path, NEW, needed_by_all="config.json"),
    ):
        with pytest.raises(ConfigError, match="only local paths and gs:// are written to"):
            write()
