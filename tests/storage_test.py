"""Whatever a library makes of a disk's error becomes one line, and nothing else does."""

import errno
import logging
import os
import resource
import subprocess
import sys

import pytest
from absl import logging as absl_logging

from beit_jax import files, storage

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "params.w/0.0" in OCDBT database at local file'
    ' "/runs/a/checkpoints/8.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/ocdbt.process_0/":'
    ' Failed writing: "/runs/a/checkpoints/8.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/d/2f":'
    " Failed to write 14218 bytes to file 9: No space left on device [os_error_code='28']"
)
ARRAY_RECORD = (
    "write() failed: No space left on device; writing /data/p/a.tmp; at byte 8192; closed"
)


def _tensorflow_error(text):
    kind = type("PermissionDeniedError", (Exception,), {"__module__": "tensorflow.errors"})
    return kind(text)


@pytest.mark.parametrize(
    ("error", "number", "path"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, ""),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/a/f"), errno.EDQUOT, "/runs/a/f"),
        (OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"), errno.EROFS, "/b"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), errno.EACCES, "/a"),
        (OSError(errno.EMFILE, "Too many open files", "/a"), errno.EMFILE, "/a"),
        (ValueError(TENSORSTORE), errno.ENOSPC, "/runs/a/checkpoints/8"),
        (RuntimeError(ARRAY_RECORD), errno.ENOSPC, "/data/p/a.tmp"),
        (_tensorflow_error("/runs/a/events.v2; Permission denied"), errno.EACCES, ""),
    ],
)
def test_an_error_of_a_disk_is_recognised(error, number, path):
    fault = storage.explain(error)
    assert (fault.number, fault.path) == (number, path)
    assert "\n" not in str(fault)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 12 GB"),
        ValueError("Permission denied"),  # anybody's
        OSError(errno.EACCES, "Permission denied"),  # of a socket: no file is named
        OSError(errno.ECONNREFUSED, "Connection refused"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"),
        ValueError("[os_error_code='2']"),
        MemoryError(),
    ],
)
def test_other_errors_are_left_as_they_are(error):
    assert storage.explain(error) is None
    assert storage.failed(error) is None
    with pytest.raises(type(error)) as raised, storage.writing("/a"):
        raise error
    assert raised.value is error


def test_the_error_that_others_were_raised_from_counts():
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    later = RuntimeError("in a thread")
    later.__cause__ = full
    assert storage.explain(later).path == "/a/b"
    meanwhile = ValueError("when closing")
    meanwhile.__context__ = later
    assert storage.explain(meanwhile).path == "/a/b"
    meanwhile.__suppress_context__ = True  # raised `from None`
    assert storage.explain(meanwhile) is None


def test_a_line_has_path_needed_and_free_bytes(tmp_path):
    fault = storage.StorageError(errno.ENOSPC, path=f"{tmp_path}/not/there", needed=3_680_000_000)
    free = storage.free_bytes(tmp_path)
    assert str(fault).startswith(f"{tmp_path}/not/there: the disk is full (3.68 GB needed, ")
    assert str(fault).endswith(" free)")
    assert free > 0
    assert storage.free_bytes("gs://bucket/a") is None
    long = storage.StorageError(errno.EROFS, path="/" + "a" * 5000)
    assert len(str(long)) < 150


def test_a_file_system_that_does_not_know_its_size_is_not_full(monkeypatch):
    """FUSE mounts of object stores say 0 blocks, all of them taken."""
    unknown = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: unknown)
    assert storage.free_bytes("/mnt/bucket") is None
    full = storage.StorageError(errno.ENOSPC, path="/mnt/bucket/a")
    assert str(full) == "/mnt/bucket/a: the disk is full"


def test_a_disk_without_inodes_is_not_called_full(monkeypatch):
    none_left = os.statvfs_result((4096, 4096, 900, 800, 800, 100, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: none_left)
    full = storage.StorageError(errno.ENOSPC, path="/a", needed=5)
    assert str(full) == "/a: the disk holds as many files as it can (inodes)"


def test_a_device_without_room_leaves_the_old_file(tmp_path):
    """A limit on the size of files is the disk of a child process."""
    (tmp_path / "a.json").write_text("old")
    program = f"""
import resource
from beit_jax import files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
files.write_whole({str(tmp_path / "a.json")!r}, b"x" * 2000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert f"StorageError: {tmp_path}/a.json: a file is larger than this disk" in last
    assert "2 kB needed" in last
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_was_printed_to_a_full_disk_is_an_error_with_its_exit_code(unbuffered):
    """Python alone ends with 120 and a message of its own, or with 0 and nothing."""
    program = """
import sys
from beit_jax import storage
try:
    print("the table")
    storage.flush_output()
except OSError as error:  # where Python does not buffer
    sys.exit(storage.failed(error))
except storage.StorageError as error:
    sys.exit(storage.failed(error))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == storage.EXIT_STORAGE
    assert done.stderr.startswith("error: /dev/stdout: the disk is full;")
    assert len(done.stderr.splitlines()) == 1


def test_too_many_open_files_is_said(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) // 2, hard))
    try:
        with pytest.raises(storage.StorageError, match=r"a\.json: too many files are open"):
            files.write_whole(tmp_path / "a.json", b"")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_fault_of_reading_that_passes_is_not_taken_for_damage():
    assert storage.passing(PermissionError(errno.EACCES, "Permission denied", "/a"))
    assert not storage.passing(OSError(errno.EIO, "Input/output error", "/a"))
    assert not storage.passing(ValueError("not a checkpoint"))


def test_threads_of_libraries_are_silent_about_a_disk_and_about_nothing_else():
    logger = absl_logging.get_absl_logger()
    full = OSError(errno.ENOSPC, "No space left on device")

    def shown(text, error=None, path="/lib/orbax/a.py"):
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord("absl", logging.ERROR, path, 1, text, (), info)
        return bool(logger.filter(record))

    with storage.said_once():
        assert not shown("thread failed", full)
        assert not shown("write failed: No space left on device")
        assert shown("thread failed", ValueError("wrong shape"))
        assert shown("No space left on device", path=storage.__file__)
    assert shown("thread failed", full)


def test_a_closed_event_loop_is_not_reported_and_other_errors_are(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: reported.append(str(one.exc_value)))

    class Ends:
        def __init__(self, text):
            self.text = text

        def __del__(self):  # an error here can't be raised to anybody
            raise RuntimeError(self.text)

    with storage.said_once():
        Ends("Event loop is closed")
        Ends("another")
    Ends("Event loop is closed")  # threads may be late
    Ends("a third")
    with storage.said_once():
        Ends("once")  # the hook is not put on twice
    assert reported == ["another", "a third", "once"]
