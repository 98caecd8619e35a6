"""Errors of disks as lines: what failed, where, how much room was needed, and how much there is.

    with storage.writing(path, needed=len(content)):
        path.write_bytes(content)  # a full disk is a StorageError

    except Exception as error:
        code = storage.failed(error)  # says it in one line and returns 74; None: not of a disk

Libraries report the same trouble in their own ways: Python as an `OSError`, TensorStore as a
`ValueError` and TensorFlow as an error of its own, both with the system's words in their text, and
Orbax from a thread, long after. `explain` finds it in any of them, and in what they were raised
from.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator

from absl import logging as absl_logging

from beit_jax.config.parse import RunError, shown

EXIT_STORAGE = 74  # EX_IOERR
_LONGEST_PATH = 200  # characters of a path that a message shows whole

# What an error means. Of those in `_ANYWHERE` the number alone shows that a disk is meant; the
# others also come from sockets and processes, and count only where a file is named.
_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "a file is larger than this disk or a limit (ulimit -f) allows",
    errno.EIO: "the disk fails (input/output error)",
    errno.ESTALE: "the network's file system lost it (stale file handle)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied (operation not permitted)",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder is in the file's place",
}
_ANYWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Not the fault of what is read: the same file may be read well the next time.
_PASSING = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'")
_LIBRARIES = ("tensorflow", "tensorstore", "orbax", "clu", "pyarrow")
_PATH = re.compile(r"""["' ](/[^"';]+)["';]""")
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a checkpoint that is being written
_STDOUT = "/dev/stdout"
_LOOP_CLOSED = "Event loop is closed"


class StorageError(RunError):
    """A disk is full, can't be written to or fails. The message is one line that names the path.

    Attributes:
      number: of `errno`.
      path: what was written or read; "" where the library did not say.
      needed: bytes that were to be written; None where they are not known.
    """

    def __init__(self, number: int, *, path: str = "", needed: int | None = None):
        self.number, self.path, self.needed = number, path, needed
        super().__init__(self._line())

    @property
    def of_room(self) -> bool:
        """Whether more room would help."""
        return self.number in _NO_ROOM

    def _line(self) -> str:
        # A path is what the reader needs most: more of it is shown than of another value.
        whole = self.path.isprintable() and len(self.path) <= _LONGEST_PATH
        where = f"{self.path if whole else shown(self.path)[1:-1]}: " if self.path else ""
        facts = []
        if self.of_room and self.needed is not None:
            facts.append(f"{size(self.needed)} needed")
        measured = self.of_room and self.path not in ("", _STDOUT)
        free = free_bytes(self.path) if measured else None
        if free is not None:
            facts.append(f"{size(free)} free")
        if self.number == errno.ENOSPC and self.path and _no_more_files(self.path):
            return f"{where}the disk holds as many files as it can (inodes)"
        return f"{where}{_FAULTS[self.number]}" + (f" ({', '.join(facts)})" if facts else "")

    def remedy(self) -> str:
        """What the same command waits for: "there is room", say."""
        return "there is room" if self.of_room else "this is put right"


def size(count: int) -> str:
    """Bytes for people: "512 bytes", "3.7 GB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def free_bytes(path: str | os.PathLike) -> int | None:
    """The free bytes where a path lies or would lie; None where nobody can say (gs://, say).

    A quota is not seen: the file system tells what it has, not what this user may take.
    """
    found = _statvfs(path)
    if found is None or not found.f_blocks:  # 0 blocks in all: a file system that does not know
        return None
    return found.f_bavail * found.f_frsize


def check_not_read_only(path: str | os.PathLike) -> None:
    """Raises StorageError where the file system of a path, or of its folder, is read-only."""
    found = _statvfs(path)
    if found is not None and found.f_flag & os.ST_RDONLY:
        raise StorageError(errno.EROFS, path=os.fspath(path))


def _no_more_files(path: str) -> bool:
    found = _statvfs(path)
    return found is not None and found.f_files > 0 and found.f_favail == 0


def _statvfs(path: str | os.PathLike) -> os.statvfs_result | None:
    """Of the nearest folder above that exists; None where there is no file system."""
    here = os.path.abspath(os.fspath(path))
    if "://" in os.fspath(path):
        return None
    while True:
        try:
            return os.statvfs(here)
        except FileNotFoundError:
            here = os.path.dirname(here)
        except (OSError, ValueError):
            return None


def explain(
    error: BaseException, *, path: str | os.PathLike = "", needed: int | None = None
) -> StorageError | None:
    """What a disk has to do with an error or with those that it was raised from; None: nothing.

    Args:
      error: of any library.
      path: what was being written, where the error does not say.
      needed: bytes that were to be written.
    """
    for one in _chain(error):
        if isinstance(one, StorageError):
            return one
        number = _number(one)
        if number is not None:
            # The file that was asked for says more than the temporary one it is written to.
            where = os.fspath(path) or _path(one)
            return StorageError(number, path=where.split(_UNFINISHED)[0], needed=needed)
    return None


def passing(error: BaseException) -> bool:
    """Whether a file could not be read for a reason that is not in the file: permission, say."""
    fault = explain(error)
    return fault is not None and fault.number in _PASSING


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what was being handled meanwhile."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        context = None if one.__suppress_context__ else one.__context__
        waiting += [other for other in (one.__cause__, context) if other is not None]


def _number(error: BaseException) -> int | None:
    """The `errno` of an error that is about a disk; None for any other."""
    if isinstance(error, OSError):
        about_file = error.filename is not None or error.errno in _ANYWHERE
        return error.errno if error.errno in _FAULTS and about_file else None
    text = str(error)
    found = _TENSORSTORE.search(text)
    if found:
        return int(found[1]) if int(found[1]) in _FAULTS else None
    # An error of a library that says so in words; of others, only what means nothing else.
    of_library = type(error).__module__.startswith(_LIBRARIES)
    numbers = _FAULTS if of_library else (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return next((number for number in numbers if os.strerror(number) in text), None)


def _path(error: BaseException) -> str:
    if isinstance(error, OSError):
        # Of a rename, the second one is the file that was wanted.
        name = error.filename2 or error.filename
        return os.fsdecode(name) if isinstance(name, str | bytes) else ""
    found = _PATH.findall(str(error))
    return found[-1] if found else ""


@contextlib.contextmanager
def writing(path: str | os.PathLike, *, needed: int | None = None) -> Iterator[None]:
    """Raises a StorageError that names `path` for whatever a disk does inside; else what comes.

    Args:
      path: what is written.
      needed: its bytes, where they are known.
    """
    try:
        yield
    except Exception as error:
        fault = explain(error, path=path, needed=needed)
        if fault is None or fault is error:
            raise
        raise fault from error


def failed(error: BaseException, *, safe: str = "nothing was written") -> int | None:
    """Says an error of a disk in one line on stderr; returns the exit code, or None for others.

    Args:
      error: that ends a command.
      safe: what the disk holds all the same.
    """
    fault = explain(error)
    if fault is None:
        return None
    if not fault.path:  # what a command writes to files has a path
        fault = StorageError(fault.number, path=_STDOUT)
    _drop_output()
    with contextlib.suppress(OSError):  # stderr may lie on the same disk
        print(
            f"error: {fault}; {safe}, and the same command does it once {fault.remedy()}",
            file=sys.stderr,
            flush=True,
        )
    return EXIT_STORAGE


def flush_output() -> None:
    """Raises a StorageError where what was printed can't be written: at the exit it is too late."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, path=_STDOUT) from error


def _drop_output() -> None:
    """Keeps Python from trying at the exit what stdout did not take."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Keeps libraries' threads from writing pages about a disk that the caller will report.

    A checkpoint that can't be written fails in a hundred threads of Orbax and TensorStore, each of
    which logs a traceback, while the first of their errors is raised where the checkpoint is waited
    for. Messages that have nothing to do with a disk pass.
    """
    loggers = [absl_logging.get_absl_logger(), logging.getLogger("asyncio")]

    def restore() -> None:
        for logger in loggers:
            logger.removeFilter(_not_of_a_disk)

    for logger in loggers:  # of handlers, a command has none
        logger.addFilter(_not_of_a_disk)
    ignore_closed_loops()
    try:
        yield
    except BaseException as error:
        if explain(error) is None:
            restore()
        # Else it stays: the threads go on, until the process ends for this error.
        raise
    restore()


def ignore_closed_loops() -> None:
    """Keeps TensorStore's threads from writing that an event loop is closed, from now on.

    After the first error of a read or a write, its loop is closed, and every array that is done
    later reports to it: a traceback each, which may come when the command has long said what is
    wrong. Hence nothing puts the hook back. All other messages reach the hook that was there.
    """
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """A `sys.unraisablehook` that passes everything to `hook` but what a closed loop is told."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], object]):
        self._hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == _LOOP_CLOSED):
            self._hook(unraisable)


def _not_of_a_disk(record: logging.LogRecord) -> bool:
    """Whether a log record is to be shown: all but a library's about a disk."""
    if os.path.dirname(os.path.abspath(__file__)) in record.pathname:
        return True
    raised = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if raised is not None and explain(raised) is not None:
        return False
    if threading.current_thread() is threading.main_thread() and record.levelno < logging.ERROR:
        return True
    return not any(os.strerror(number) in record.getMessage() for number in _FAULTS)
