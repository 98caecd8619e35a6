"""metrics.jsonl: each step and kind once, in order, and nothing overwritten that is not ours."""

import errno
import json
import os
import types

import pytest
from etils import epath

from beit_jax import metrics_file
from beit_jax.metrics_file import MetricsFile, read
from beit_jax.storage import StorageError


def line(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def aside(path):
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.aside-"))


def test_lines_are_written_in_order_and_read_back(path):
    log = MetricsFile(path, start_step=0)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": float("nan"), "norm": float("inf")})
    log.write(2, {"eval_loss": 2})
    log.flush()
    assert path.read_text() == (
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null, "norm": null}\n'
        '{"step": 2, "eval_loss": 2.0}\n'
    )
    assert [sorted(one) for one in read(path)] == [
        ["loss", "step"],
        ["loss", "norm", "step"],
        ["eval_loss", "step"],
    ]


def test_a_file_that_is_as_it_should_be_is_left_alone(path):
    path.write_text(line(1, loss=2.0) + line(2, loss=1.0))
    before = path.stat()
    MetricsFile(path, start_step=2).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_steps_that_are_repeated_are_dropped(path, caplog):
    lines = [line(step, loss=step) for step in range(1, 6)]
    path.write_text("".join(lines) + line(4, eval_loss=1.0))
    with caplog.at_level("INFO"):
        log = MetricsFile(path, start_step=3)
    assert path.read_text() == "".join(lines[:3])
    assert "lines after step 3 are dropped (3 in all)" in caplog.text
    assert log.held_out_at_start is None


def test_of_lines_with_the_same_key_the_last_stays_in_its_place(path):
    """What earlier versions left behind: repeated, out of order."""
    path.write_text(
        line(1, loss=1.0) + line(3, loss=9.0) + line(2, loss=2.0) + line(2, eval_loss=5.0)
        + line(3, loss=3.0) + line(2, eval_loss=4.0)
    )  # fmt: skip
    wanted = [line(1, loss=1.0), line(2, loss=2.0), line(2, eval_loss=4.0), line(3, loss=3.0)]
    assert read(path) == [json.loads(one) for one in wanted]
    log = MetricsFile(path, start_step=3)
    assert path.read_text() == "".join(wanted)
    assert not aside(path)
    log.write(2, {"loss": 2.5})
    log.write(4, {"loss": 4.0})
    log.write(3, {"loss": 3.0})
    wanted[1] = line(2, loss=2.5)
    assert path.read_text() == "".join(wanted) + line(4, loss=4.0)


def test_the_held_out_line_of_the_start_is_known(path):
    path.write_text(line(2, loss=1.0) + line(2, eval_loss=4.0) + line(3, loss=1.0))
    assert MetricsFile(path, start_step=2).held_out_at_start == {"step": 2, "eval_loss": 4.0}
    assert MetricsFile(path, start_step=1).held_out_at_start is None


@pytest.mark.parametrize("cut", range(1, len(line(2, loss=0.5))))
def test_a_last_line_is_there_whole_or_not_at_all(path, cut):
    """Cut off anywhere; without its newline alone it is whole."""
    last = line(2, loss=0.5)
    path.write_text(line(1, loss=1.0) + last[:cut])
    whole = cut == len(last) - 1
    MetricsFile(path, start_step=2).write(3, {"loss": 3.0})
    assert path.read_text() == line(1, loss=1.0) + (last if whole else "") + line(3, loss=3.0)
    assert not aside(path)


@pytest.mark.parametrize(
    "foreign",
    [
        b"not JSON\n",
        b'{"loss": 1.0}\n',
        b'{"step": 1.5}\n',
        b'{"step": -1}\n',
        b'{"step": true}\n',
        b'{"step": 1, "loss": NaN}\n',
        b'{"step": 1, "loss": 1e999}\n',
        b'{"step": 1, "note": "mine"}\n',
        b'{"step": 1, "loss": 1.0, "loss": 2.0}\n',
        b'["step", 1]\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 2, "lo\n',  # cut off, but not at the end
        b"\xff\xfe\x00\n",
        b"\x00" * 50,  # the end of a file after a power failure
        b"words of somebody's, with no newline",
    ],
    ids=lambda foreign: repr(foreign[:24]),
)
def test_what_is_not_ours_is_set_aside_and_the_rest_is_kept(path, caplog, foreign):
    ours = line(1, loss=7.0).encode(), line(2, loss=8.0).encode()
    content = ours[0] + foreign if not foreign.endswith(b"\n") else ours[0] + foreign + ours[1]
    path.write_bytes(content)
    log = MetricsFile(path, start_step=2)
    assert "line 2 and 0 others are no metrics" in caplog.text
    (copy,) = aside(path)
    assert copy.read_bytes() == content
    log.write(3, {"loss": 3.0})
    assert [one["step"] for one in read(path)] == [1, *([2] if ours[1] in content else []), 3]
    MetricsFile(path, start_step=3)
    assert len(aside(path)) == 1


def test_a_second_foreign_file_gets_another_name(path):
    for _ in range(2):
        path.write_text("not JSON\n")
        MetricsFile(path, start_step=0)
    assert [p.name for p in aside(path)] == ["metrics.jsonl.aside-1", "metrics.jsonl.aside-2"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_moved_away(path, caplog, make):
    make(path)
    MetricsFile(path, start_step=0).write(1, {"loss": 1.0})
    assert "is no file" in caplog.text
    assert len(aside(path)) == 1
    assert path.read_text() == line(1, loss=1.0)


def test_an_opening_that_is_killed_loses_nothing(path, monkeypatch):
    """Wherever it ends, the old file is whole, here or under another name."""
    content = line(1, loss=1.0) + "not JSON\n" + line(2, loss=2.0) + line(9, loss=9.0)
    path.write_text(content)
    original = metrics_file.write_whole
    for writes in (0, 1):
        left = iter(range(writes))

        def killed(target, new, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            original(target, new)

        monkeypatch.setattr(metrics_file, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsFile(path, start_step=2)
        assert path.read_text() == content
    monkeypatch.undo()
    MetricsFile(path, start_step=2)
    assert path.read_text() == line(1, loss=1.0) + line(2, loss=2.0)
    assert aside(path)[0].read_text() == content


def test_a_line_is_added_in_one_call(path, monkeypatch):
    """A kill can't divide it."""
    calls = []
    original = os.write
    log = MetricsFile(path, start_step=0)
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or original(fd, data))
    log.write(1, {"loss": 1.0})
    assert calls == [line(1, loss=1.0).encode()]


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(path, monkeypatch):
    log = MetricsFile(path, start_step=0)
    log.write(1, {"loss": 1.0})
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[:7]))
    with pytest.raises(StorageError, match="the disk is full") as error:
        log.write(2, {"loss": 2.0})
    assert (error.value.number, error.value.path) == (errno.ENOSPC, str(path))
    assert path.read_text() == line(1, loss=1.0)


def test_on_an_object_store_lines_wait_for_each_other(tmp_path, monkeypatch):
    """They are there before a checkpoint is, and at the end; nothing is ever appended."""
    place = lambda path: epath.Path(tmp_path / str(path).removeprefix("gs://"))  # noqa: E731
    monkeypatch.setattr(metrics_file, "epath", types.SimpleNamespace(Path=place))
    stored = tmp_path / "run/metrics.jsonl"
    stored.parent.mkdir()
    stored.write_text(line(1, loss=1.0) + line(2, loss=2.0) + line(7, loss=7.0))
    writes = []
    original = metrics_file.write_whole
    monkeypatch.setattr(
        metrics_file, "write_whole", lambda path, new: writes.append(new) or original(path, new)
    )
    log = MetricsFile("gs://run/metrics.jsonl", start_step=2)
    for step in (3, 4, 5):
        log.write(step, {"loss": step})
    log.write(4, {"loss": 0.0})
    assert len(writes) == 1
    log.flush()
    log.flush()
    assert len(writes) == 2
    assert [one["loss"] for one in read(stored)] == [1.0, 2.0, 3.0, 0.0, 5.0]
    log.write(6, {"loss": 6.0})
    monkeypatch.setattr(metrics_file, "UPLOAD_SECONDS", 0.0)
    log.write(7, {"loss": 7.0})
    assert [one["step"] for one in read(stored)] == list(range(1, 8))
    log.write(7, {"eval_loss": 7.0})
    monkeypatch.setattr(metrics_file, "UPLOAD_SECONDS", 60.0)
    log.close()
    assert stored.read_bytes() == writes[-1]


def test_lines_without_any_checkpoint_are_kept_under_another_name(path, caplog):
    """They may be another program's, or the record of a run whose checkpoints were deleted."""
    content = '{"step": 1, "loss": 2.0, "reward": 7}\n{"step": 2, "loss": 1.0, "reward": 8}\n'
    path.write_text(content)
    MetricsFile(path, start_step=0)
    assert path.read_bytes() == b""
    (copy,) = aside(path)
    assert copy.read_text() == content
    assert copy.name in caplog.text
