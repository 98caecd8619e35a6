"""`metrics.jsonl`: every logged step exactly once, in order, whatever happened to the run.

    log = MetricsFile("runs/a/metrics.jsonl", start_step=20)
    log.write(21, {"loss": 2.5})
    log.write(21, {"eval_loss": 2.4})
    log.flush()  # before the checkpoint of step 21 is written
    lines = read("runs/a/metrics.jsonl")

A line is a JSON object with the step and finite numbers or null. Its key is the step and its kind:
held-out results have names that start with `eval_`, what an evaluation between steps found
(`tasks/online.py`) has names that start with `online_`, every other line is of training. A key has
one line. The newest one stays: a step that is done again is logged again.

What a kill leaves behind is put right when the file is opened:

- Lines of steps after the one the run starts from: those steps are repeated, so they go.
- A last line that was cut off: it goes, and so was its step's checkpoint never written, since
  `flush` comes first.
- A line that is none of this module's: the whole file is copied to another name before the lines
  that can be read are written back.
"""

import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Mapping
from typing import SupportsFloat, TypeAlias

from absl import logging
from etils import epath

from beit_jax import storage
from beit_jax.files import write_whole
from beit_jax.json_text import JsonError, json_object
from beit_jax.types import JsonObject

TRAINING, HELD_OUT, ONLINE = 0, 1, 2
HELD_OUT_PREFIX, ONLINE_PREFIX = "eval_", "online_"
# Object stores know no appending: the whole file is uploaded again, so lines wait for each other.
UPLOAD_SECONDS = 60.0
_LARGEST_LINE = 1 << 20  # bytes; a probe of 24 blocks with 13 settings each has 10 kB
_START = b'{"step": '  # of every line that this module or an older version wrote

Key: TypeAlias = tuple[int, int]  # step, kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """A file's lines.

    Attributes:
      lines: each with its newline, by key, in the order of steps.
      foreign: numbers of the lines, from 1, that are none of this module's.
    """

    lines: dict[Key, bytes]
    foreign: tuple[int, ...] = ()

    def joined(self) -> bytes:
        """The file as it should be."""
        return b"".join(self.lines.values())


class MetricsFile:
    """Writes a run's `metrics.jsonl`; in one process, which alone may write it.

    Args:
      path: local or gs://. On gs://, lines reach the file once a minute, at `flush` and at `close`.
      start_step: where the run starts; later lines are dropped.

    Raises:
      OSError: it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike, *, start_step: int):
        self._path = epath.Path(path)
        self._remote = "://" in os.fspath(path)
        content, found = self._open()
        lines = {key: line for key, line in found.lines.items() if key[0] <= start_step}
        later = len(found.lines) - len(lines)
        if later:
            logging.info(
                "%s: lines after step %d are dropped (%d in all): those steps are repeated",
                *(self._path, start_step, later),
            )
        if found.foreign:
            self._set_aside(content, found.foreign)
        elif later and not start_step:
            # No checkpoint is left: it may be the log of another program, or of a run whose
            # checkpoints were deleted to save room.
            aside = self._keep(content)
            logging.warning(
                "%s: there is no checkpoint; the file as it was is now %s", self._path, aside
            )
        kept = _Content(lines=lines)
        if kept.joined() != content:
            write_whole(self._path, kept.joined())
        self._last: Key | None = max(lines, default=None)
        at_start = {kind: lines.get((start_step, kind)) for kind in (HELD_OUT, ONLINE)}
        self._at_start = {kind: line and _values(line) for kind, line in at_start.items()}
        # On gs://, the file as it should be, and whether it is not yet.
        self._whole = bytearray(kept.joined() if self._remote else b"")
        self._waiting, self._uploaded = False, time.monotonic()

    @property
    def held_out_at_start(self) -> JsonObject | None:
        """The held-out line of the step that the run starts from; None where it has none yet."""
        return self._at_start[HELD_OUT] or None

    @property
    def online_at_start(self) -> JsonObject | None:
        """The same of the line of an evaluation between steps."""
        return self._at_start[ONLINE] or None

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Writes the line of a step; one of the same step and kind is replaced.

        Args:
          step: steps done.
          values: those that are not finite become null.

        Raises:
          StorageError: there is no room, say; the file then ends with the line before.
        """
        numbers = {name: float(value) for name, value in values.items()}
        plain = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        line = json.dumps({"step": step, **plain}).encode() + b"\n"
        key = (step, _kind(plain))
        if self._last is not None and key <= self._last:
            self._replace(key, line)
            return
        if self._remote:
            self._whole += line
            self._waiting = True
            if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
                self.flush()
        else:
            with storage.writing(self._path, needed=len(line)):
                _append(os.fspath(self._path), line)
        self._last = key

    def flush(self) -> None:
        """Brings all lines to the disk; a checkpoint that is written next has its lines for sure.

        Raises:
          OSError: that failed.
        """
        if self._remote:
            if self._waiting:
                write_whole(self._path, bytes(self._whole))
                self._waiting, self._uploaded = False, time.monotonic()
        elif self._last is not None:
            with storage.writing(self._path):
                descriptor = os.open(self._path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Brings all lines to the file."""
        if self._remote:
            self.flush()

    def _open(self) -> tuple[bytes, _Content]:
        """The file's bytes and what they hold; what is no file is moved out of the way."""
        if not self._path.exists():
            return b"", _Content(lines={})
        if not self._remote and not os.path.isfile(self._path):
            aside = _free_name(self._path)
            self._path.rename(aside)
            logging.error("%s is no file: it is now %s, and a new one starts", self._path, aside)
            return b"", _Content(lines={})
        content = self._path.read_bytes()
        return content, _parse(content)

    def _keep(self, content: bytes) -> epath.Path:
        """Writes the file as it was under another name."""
        aside = _free_name(self._path)
        write_whole(aside, content)
        return aside

    def _set_aside(self, content: bytes, foreign: tuple[int, ...]) -> None:
        aside = self._keep(content)
        logging.error(
            "%s: line %d and %d others are no metrics; the file as it was is now %s, and its other"
            " lines are kept",
            *(self._path, foreign[0], len(foreign) - 1, aside),
        )

    def _replace(self, key: Key, line: bytes) -> None:
        """Puts a line in its place, not at the end; rare, so that reading all again may be slow."""
        if self._remote:
            content, found = bytes(self._whole), _parse(bytes(self._whole))
        else:
            content, found = self._open()
        if found.foreign:  # somebody else has written since
            self._set_aside(content, found.foreign)
        new = _Content(lines=dict(sorted((found.lines | {key: line}).items()))).joined()
        if new == content:
            return
        if self._remote:
            self._whole, self._waiting = bytearray(new), True
        else:
            write_whole(self._path, new)


def read(path: str | os.PathLike) -> list[JsonObject]:
    """The lines of a `metrics.jsonl`, each step's once, in order; see the module's docstring.

    What is cut off or none of this project's lines is left out.

    Raises:
      OSError: it can't be read.
    """
    lines, _ = parsed(epath.Path(path).read_bytes())
    return lines


def parsed(content: bytes) -> tuple[list[JsonObject], tuple[int, ...]]:
    """What `read` gives of a file's bytes, and the lines that it leaves out, from 1.

    A last line that was cut off is not among them: a run that is writing leaves such.
    """
    found = _parse(content)
    lines = [value for line in found.lines.values() if (value := _values(line))]
    return lines, found.foreign


def _parse(content: bytes) -> _Content:
    lines: dict[Key, bytes] = {}
    foreign = []
    parts = content.split(b"\n")
    for number, part in enumerate(parts, start=1):
        if not part.strip():
            continue
        values = _values(part)
        if values is not None:
            lines[values["step"], _kind(values)] = part + b"\n"
        elif number < len(parts) or not _is_cut_off(part):
            foreign.append(number)
    return _Content(lines=dict(sorted(lines.items())), foreign=tuple(foreign))


def _values(line: bytes) -> JsonObject | None:
    """A line's object; None where it is none of this module's lines."""
    try:
        values = json_object(line, path="line", largest=_LARGEST_LINE)
    except JsonError:
        return None
    step = values.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        return None
    numbers = all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values.values()
    )
    return values if numbers else None


def _is_cut_off(part: bytes) -> bool:
    """Whether a last line without its newline is the beginning of one of ours, in ASCII."""
    return part.startswith(_START[: len(part)]) and part.isascii() and b"\0" not in part


def _kind(values: Mapping[str, float | None]) -> int:
    if any(name.startswith(HELD_OUT_PREFIX) for name in values):
        return HELD_OUT
    return ONLINE if any(name.startswith(ONLINE_PREFIX) for name in values) else TRAINING


def _append(path: str, line: bytes) -> None:
    """Adds a line in one call, which a kill can't divide; all of it or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)


def _free_name(path: epath.Path) -> epath.Path:
    number = 1
    while (aside := path.parent / f"{path.name}.aside-{number}").exists():
        number += 1
    return aside
