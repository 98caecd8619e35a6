"""A lock for file systems that have none: files that say who is there, renewed while he is.

    claim = Claim.take(folder, holder=holder, on_lost=stop)
    ...
    claim.release()

For `gs://`, network disks and FUSE, where a lock of the kernel is not supported or ends at this
host. Every process that wants the folder writes a file of its own in it, its claim, and changes it
every few seconds. No clocks are compared: a claim is alive as soon as it is seen to change, and
dead, and removed, when it has not changed for `PATIENCE` seconds of being watched.

A file system that lists a file as soon as its writing has returned (`gs://` and POSIX do) gives
this: of two processes the one that lists last sees the other. So whoever sees nobody else holds the
folder; of two that see each other before either holds, the smaller token stays and the other goes.
A holder that was stopped for longer than others had patience finds that its claim is gone, or that
there is one of a later generation, and ends.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from absl import logging
from etils import epath

from beit_jax.files import open_regular, write_whole
from beit_jax.json_text import JsonError, json_object
from beit_jax.types import JsonObject

RENEWAL = 5.0  # seconds between two changes of a claim
PATIENCE = 30.0  # seconds until a claim that does not change is dead
_LARGEST = 10_000  # bytes of a claim
_SUFFIX = ".json"
_NAME = re.compile(r"[0-9a-f]{16}\.json")  # what has another name is no claim, and stays

State = Literal["claiming", "holding"]


class InUseError(Exception):
    """Somebody else holds the folder; `holder` is what he says of himself."""

    def __init__(self, holder: JsonObject):
        super().__init__("in use")
        self.holder = holder


class NotAClaimError(OSError):
    """Something that is no file has a claim's name: a folder or a pipe, `filename`."""


@dataclasses.dataclass(kw_only=True)
class _Seen:
    """A claim of another process: its content, and since when it has been this."""

    content: bytes
    since: float
    alive: bool = False


class Claim:
    """This process' claim to a folder; made by `take`."""

    def __init__(
        self,
        folder: epath.Path,
        *,
        holder: JsonObject,
        on_lost: Callable[[JsonObject], None],
        renewal: float,
        patience: float,
    ):
        self._folder, self._holder, self._on_lost = folder, holder, on_lost
        self._renewal, self._patience = renewal, patience
        self._token = secrets.token_hex(8)
        self._path = folder / f"{self._token}{_SUFFIX}"
        self._state: State = "claiming"
        self._generation, self._counter = 1, 0
        self._ended = threading.Event()
        self._renewing = threading.Lock()  # so that nothing is written after the release
        self._process = os.getpid()

    @classmethod
    def take(
        cls,
        folder: epath.Path,
        *,
        holder: JsonObject,
        on_lost: Callable[[JsonObject], None],
        renewal: float = RENEWAL,
        patience: float = PATIENCE,
    ) -> "Claim":
        """Claims the folder and keeps renewing the claim in a thread.

        Returns at once where nobody else has a claim; where there is one, after it has changed or
        not for long enough.

        Args:
          folder: of the claims, made where it is missing. Files of other names stay as they are.
          holder: what this process says of itself, for others' messages.
          on_lost: called in the thread, with the new holder ({} where none is seen), when another
            process has taken over.
          renewal: seconds between two changes of the claim.
          patience: seconds until an unchanged claim of another process is dead.

        Raises:
          InUseError: another process holds the folder.
          NotAClaimError: what is no file has a claim's name.
          OSError: the folder can't be written or read.
        """
        claim = cls(folder, holder=holder, on_lost=on_lost, renewal=renewal, patience=patience)
        try:
            claim._settle()
            claim._state = "holding"
            claim._write()
        except BaseException:
            claim._path.unlink(missing_ok=True)
            raise
        threading.Thread(target=claim._renew, name="run lock", daemon=True).start()
        return claim

    def release(self) -> None:
        """Removes the claim; does nothing in a child that was forked meanwhile."""
        if os.getpid() != self._process:
            return
        self._ended.set()
        with self._renewing:
            self._path.unlink(missing_ok=True)

    def _settle(self) -> None:
        """Waits until no other claim is left, or raises InUseError."""
        self._write()
        seen: dict[str, _Seen] = {}
        poll = min(1.0, self._renewal / 4)
        while self._others_left(seen):
            time.sleep(poll)
            if not self._path.exists():  # others took this process for dead while it was stopped
                raise InUseError({})
            self._write()

    def _others_left(self, seen: dict[str, _Seen]) -> bool:
        """Looks at the other claims once, and removes dead ones; whether there are any left."""
        now, found = time.monotonic(), self._others()
        for token, content in found.items():
            known = seen.get(token)
            if known is None:
                seen[token] = _Seen(content=content, since=now)
                if not _certainly_dead(_parsed(content)):
                    self._log_waiting(_parsed(content))
            elif known.content != content:
                seen[token] = _Seen(content=content, since=now, alive=True)
        left = False
        for token, content in found.items():
            claim, known = _parsed(content), seen[token]
            self._generation = max(self._generation, _generation(claim) + 1)
            if _certainly_dead(claim) or now - known.since > self._patience:
                logging.warning("%s had ended without leaving: its claim is removed", name(claim))
                (self._folder / f"{token}{_SUFFIX}").unlink(missing_ok=True)
                continue
            if known.alive and (claim.get("state") == "holding" or token < self._token):
                raise InUseError(claim)
            left = True
        return left

    def _log_waiting(self, claim: JsonObject) -> None:
        logging.warning(
            "%s has a claim to %s; waiting up to %.0f s to see whether it is alive",
            name(claim),
            self._folder.parent,
            self._patience,
        )

    def _others(self) -> dict[str, bytes]:
        """The other processes' claims by token; those that vanish meanwhile are left out."""
        found = {}
        for path in self._folder.iterdir():
            token = path.name.removesuffix(_SUFFIX)
            if token == self._token or not _NAME.fullmatch(path.name):
                continue
            try:
                found[token] = _content(path)
            except FileNotFoundError:
                continue
        return found

    def _write(self) -> None:
        self._counter += 1
        content = {
            **self._holder,
            "state": self._state,
            "generation": self._generation,
            "counter": self._counter,
        }
        write_whole(self._path, json.dumps(content).encode())

    def _renew(self) -> None:
        """In the thread: changes the claim, and looks whether it still counts."""
        while not self._ended.wait(self._renewal):
            with self._renewing:
                if self._ended.is_set():
                    return
                try:
                    newer = self._newer()
                    if newer is None:
                        self._write()
                        continue
                except NotAClaimError as error:
                    logging.warning("%s %s: it is no claim", error.filename, error.strerror)
                    with contextlib.suppress(OSError):
                        self._write()
                    continue
                except OSError as error:
                    # Others will take this process for dead if it goes on; then the claim is gone.
                    logging.warning("the run's lock can't be renewed: %s", error)
                    continue
            self._ended.set()
            self._on_lost(newer)
            return

    def _newer(self) -> JsonObject | None:
        """The process that has taken over, {} where only the claim is gone; None for neither."""
        for content in self._others().values():
            claim = _parsed(content)
            if claim.get("state") == "holding" and _generation(claim) > self._generation:
                return claim
        return None if self._path.exists() else {}


def _content(path: epath.Path) -> bytes:
    """A file's first bytes; more than `_LARGEST` of them are no claim."""
    if "://" in str(path):
        return path.read_bytes()
    if os.path.isdir(path):
        raise NotAClaimError(errno.EISDIR, "is a folder", str(path))
    try:
        with open_regular(str(path)) as file:
            return file.read(_LARGEST + 1)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise NotAClaimError(errno.EINVAL, "is no file", str(path)) from None
        raise


def _parsed(content: bytes) -> JsonObject:
    """A claim; {} where it is none that can be read."""
    try:
        return json_object(content, path="a claim", largest=_LARGEST)
    except JsonError:
        return {}


def _generation(claim: Mapping[str, object]) -> int:
    value = claim.get("generation")
    return value if isinstance(value, int) else 0


def name(holder: Mapping[str, object]) -> str:
    """A process in messages: "process 1234 on host-a"."""
    pid, host = holder.get("pid"), holder.get("host")
    if not isinstance(pid, int) or not isinstance(host, str) or not host.isprintable():
        return "another process"
    return f"process {pid} on {host[:80]}"


def myself() -> JsonObject:
    """What this process says of itself; `started`, `boot` and `space` tell it from all others."""
    return {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "since": time.strftime("%Y-%m-%d %H:%M"),
        "started": _started(os.getpid()),
        "boot": _boot(),
        "space": _space(),
    }


def _certainly_dead(claim: Mapping[str, object]) -> bool:
    """Whether a claim is of this machine and its process is gone; False where it is not known.

    Containers of one machine number their processes separately, hence `space`.
    """
    pid, started = claim.get("pid"), claim.get("started")
    if not isinstance(pid, int) or not started or not _boot() or not _space():
        return False
    here = claim.get("boot") == _boot() and claim.get("space") == _space()
    return here and _started(pid) != started


def _started(pid: int) -> str:
    """When the kernel started a process, in ticks since the boot; "" where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The fields are counted from behind the name, which may contain spaces and brackets.
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
