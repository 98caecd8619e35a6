"""One run in a directory at a time: the second is refused by the first one's host and process.

    with run_lock.hold("runs/a"):
        ...  # writes to runs/a

On a local disk the kernel holds the lock (flock on `run.lock`) and drops it with the process, even
where that is killed; data workers that it leaves behind do not keep it. Elsewhere, on `gs://`,
network disks and FUSE, there are claims in `run.claims/` (`training/claims.py`), on disks besides
the kernel's lock, which may end at this host. Of a run's processes, the first one holds it for all.
"""

import contextlib
import errno
import json
import os
import stat
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from beit_jax.config import ConfigError
from beit_jax.distributed import cluster, watchdog
from beit_jax.json_text import JsonError, json_object
from beit_jax.training import claims
from beit_jax.types import JsonObject

try:
    import fcntl
except ImportError:  # not a Unix; there are only claims
    fcntl = None  # type: ignore[assignment]

FILE, CLAIMS = "run.lock", "run.claims"
_MARK = "beit_jax run lock"  # the file's first key
# Of flock, where the file system has none.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# File systems of one machine, whose flock is known to every process that can see the file. On
# others (NFS, FUSE, Lustre) it depends on how they were mounted.
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay")
_held: dict[str, int] = {}  # directories that this process holds, and how often
_descriptors: set[int] = set()  # of their files
_guard = threading.Lock()


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
    """Holds a run's directory, which is made where it is missing.

    All processes of a run call it; process 0 takes the lock and the others learn what became of it.
    Within a process it may be held several times over (a job within a job).

    Args:
      workdir: the run's directory, local or gs://.

    Raises:
      ConfigError: another run holds it, or a file of somebody else's is in the lock's place.
    """
    with contextlib.ExitStack() as stack:
        refused = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(_hold_here(workdir))
            except ConfigError as error:
                refused = str(error)
        (refused, *_) = cluster.gather("the run's lock", refused)
        if refused:
            raise ConfigError(refused)
        yield


@contextlib.contextmanager
def _hold_here(workdir: str) -> Iterator[None]:
    key = workdir if "://" in workdir else os.path.realpath(workdir)
    with _guard:
        nested = _held.get(key, 0)
        _held[key] = nested + 1
    with contextlib.ExitStack() as stack:
        try:
            if not nested:
                _take(workdir, stack)
            yield
        finally:
            with _guard:
                _held[key] = _held.get(key, 1) - 1
                if not _held[key]:
                    del _held[key]


def _take(workdir: str, stack: contextlib.ExitStack) -> None:
    """Takes the locks that the file system needs; `stack` releases them."""
    remote = "://" in workdir
    me = claims.myself()
    if not remote and not os.path.exists(workdir):
        stack.callback(_remove_empty, os.path.abspath(workdir))
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    locked = False
    if not remote and fcntl is not None:
        descriptor = _lock_file(os.path.join(workdir, FILE), workdir=workdir, me=me)
        if descriptor is not None:
            stack.callback(_release, descriptor, os.path.join(os.path.abspath(workdir), FILE))
            locked = True
    if locked and _file_system(workdir) in _LOCAL:
        return

    def stop(holder: JsonObject) -> None:
        _stop(workdir, holder)

    try:
        folder = epath.Path(workdir if remote else os.path.abspath(workdir)) / CLAIMS
        claim = claims.Claim.take(folder, holder=me, on_lost=stop)
    except claims.InUseError as error:
        raise ConfigError(in_use(workdir, error.holder)) from None
    except claims.NotAClaimError as error:
        raise _not_a_lock(str(error.filename)) from None
    except (NotADirectoryError, FileExistsError):
        raise _not_a_lock(f"{workdir}/{CLAIMS}") from None
    stack.callback(claim.release)


def _remove_empty(folder: str) -> None:
    """Leaves nothing of a run that was refused before it wrote anything."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def in_use(workdir: str, holder: JsonObject) -> str:
    """The line for the second run."""
    since = holder.get("since")
    text = f" since {since}" if isinstance(since, str) and since[:16].isprintable() else ""
    return (
        f"--workdir: {workdir} is in use by {claims.name(holder)}{text[:23]};"
        " wait for that run, end it, or choose another --workdir"
    )


def _lock_file(path: str, *, workdir: str, me: JsonObject) -> int | None:
    """Locks the file and writes who this is; None where the file system has no locks.

    Raises:
      ConfigError: another process has locked it, or it is no lock.
    """
    while True:
        descriptor = _open(path)
        try:
            content = os.pread(descriptor, 4096, 0)
            if content.strip(b"\0 \n") and not content.startswith(f'{{"{_MARK}"'.encode()):
                raise _not_a_lock(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
            os.close(descriptor)  # its holder has left and removed it meanwhile
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise ConfigError(in_use(workdir, holder)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            return None
        except BaseException:
            os.close(descriptor)
            raise
    _descriptors.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps({_MARK: 1, **me}) + "\n").encode(), 0)
    except OSError as error:  # a full disk: the lock holds without a name in it
        logging.warning(
            "%s can't be written (%s): a second run is refused, but not told by whom", path, error
        )
    return descriptor


def _open(path: str) -> int:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_a_lock(path) from None
        if error.errno == errno.ENOENT:  # a refused run has removed its empty folder
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return _open(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_lock(path)
    return descriptor


def _not_a_lock(path: str) -> ConfigError:
    return ConfigError(
        f"--workdir: {path} is not the lock of a run; move it away, or choose another --workdir"
    )


def _holder(path: str) -> JsonObject:
    """Who has locked the file; it writes its name right after that."""
    for _ in range(10):
        try:
            with open(path, "rb") as file:
                return json_object(file.read(4096), path=path)
        except (OSError, JsonError):
            time.sleep(0.1)
    return {}


def _release(descriptor: int, path: str) -> None:
    """Removes the file, then unlocks it by closing it.

    Not in a child that was forked meanwhile: it has closed the file, and its parent goes on.
    """
    if descriptor not in _descriptors:
        return
    _descriptors.discard(descriptor)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.unlink(path)
    os.close(descriptor)


def _forget() -> None:
    """In a forked child: its copy would keep the lock alive beyond the run's own end."""
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _stop(workdir: str, holder: JsonObject) -> None:
    """Ends this process at once: another run writes to the directory."""
    by = f", by {claims.name(holder)}," if holder else ""
    message = (
        f"--workdir: {workdir} was taken over{by} while this run did not answer for"
        f" {claims.PATIENCE:.0f} s; it ends here, and what it saved before is there"
    )
    cluster.end(code=cluster.EXIT_SETTINGS, error=ConfigError(message), message=message)
    watchdog.leave("", cluster.EXIT_SETTINGS)


def _file_system(path: str) -> str:
    """The type of the file system that a local path is on; "" where it is not known."""
    real, best, found = os.path.realpath(path), "", ""
    try:
        with open("/proc/self/mounts") as file:
            for line in file:
                _, mount, kind, *_ = line.split()
                mount = mount.encode().decode("unicode_escape")  # blanks are \040
                inside = real == mount or real.startswith(mount.rstrip("/") + "/")
                if inside and len(mount) >= len(best):
                    best, found = mount, kind
    except (OSError, ValueError):
        return ""
    return found
