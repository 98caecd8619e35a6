"""Progress of what takes long: one changing line on a terminal, occasional lines in a log.

    for name in over(names, total=len(names), doing="reading", unit="files"): ...

    with waiting("compiling the train step"):
        compiled = lowered.compile()

Whatever ends within two seconds (on a terminal) or half a minute (in a log) shows nothing.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Seconds between two lines in a log, and between two changes of the line on a terminal.
_LOG_EVERY, _DRAW_EVERY = 30.0, 0.2
_PATIENCE = 2.0  # seconds before anything is drawn on a terminal
_BAR = 20  # characters


class Progress:
    """Counts on stderr.

    Args:
      total: how many there will be; None where nobody knows.
      unit: what is counted, in the plural.
      doing: what is done, for the beginning of the line.
      shown: False says nothing, for all but one of several processes.
    """

    def __init__(
        self, total: int | None, *, unit: str = "images", doing: str = "", shown: bool = True
    ):
        self._total, self._unit, self._doing = total, unit, doing
        self._began = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._next = self._began + (_PATIENCE if self._terminal else _LOG_EVERY)
        self._on, self._drawn = shown, False

    def update(self, done: int) -> None:
        """Shows how many are done so far, the speed and the time left, rate-limited."""
        now = time.perf_counter()
        if not self._on or now < self._next:
            return
        self._next = now + (_DRAW_EVERY if self._terminal else _LOG_EVERY)
        speed = done / (now - self._began)
        parts = [f"{done} {self._unit}", f"{speed:.1f} {self._unit}/s"]
        if self._total is not None:
            left = (self._total - done) / speed if speed else 0.0
            parts = [f"{done}/{self._total} {self._unit}", parts[1], f"{left:.0f} s left"]
        self._show(", ".join(parts), share=done / self._total if self._total else None)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.finish()
        print(line, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Clears the line on a terminal."""
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._drawn = False

    def _show(self, text: str, *, share: float | None) -> None:
        line = f"{self._doing}: {text}" if self._doing else text
        if not self._terminal:
            print(line, file=sys.stderr, flush=True)
            return
        if share is not None:
            full = round(min(share, 1.0) * _BAR)
            line = f"[{'#' * full}{'.' * (_BAR - full)}] {line}"
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        self._drawn = True


def over(
    items: Iterable[T],
    *,
    total: int | None = None,
    doing: str = "",
    unit: str = "images",
    size: Callable[[T], int] = lambda _: 1,
    shown: bool = True,
) -> Iterator[T]:
    """The items, with the progress of whoever takes them.

    Args:
      items: anything that can be iterated over.
      total, doing, unit, shown: as for `Progress`.
      size: how many units an item is: a batch's images, say.
    """
    progress, done = Progress(total, unit=unit, doing=doing, shown=shown), 0
    try:
        for item in items:
            yield item
            done += size(item)
            progress.update(done)
    finally:
        progress.finish()


@contextlib.contextmanager
def waiting(doing: str, *, usually: str = "", shown: bool = True) -> Iterator[None]:
    """Shows how long something has taken that can't be counted, until it ends.

    Args:
      doing: what is waited for.
      usually: how long that takes, where it is known: "usually 40 s".
      shown: False says nothing.
    """
    if not shown:
        yield
        return
    over_now, began, terminal = threading.Event(), time.perf_counter(), sys.stderr.isatty()

    def tick() -> None:
        drawn = False
        pause = _PATIENCE if terminal else _LOG_EVERY
        while not over_now.wait(pause):
            pause = 1.0 if terminal else _LOG_EVERY
            line = f"{doing}: {time.perf_counter() - began:.0f} s so far"
            line += f", {usually}" if usually else ""
            print(
                f"\r\033[K{line}" if terminal else line,
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
            drawn = terminal
        if drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over_now.set()
        thread.join()
