"""Progress of a long command: one updating line on a terminal, occasional lines in a log."""

import sys
import time

# Seconds between two lines in a log, and between two changes of the line on a terminal.
_LOG_EVERY, _DRAW_EVERY = 30.0, 0.2


class Progress:
    """Counts images on stderr.

    Args:
      total: images.
    """

    def __init__(self, total: int):
        self._total, self._began = total, time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._shown = self._began

    def update(self, done: int) -> None:
        """Shows the number of images done so far, the speed and the time left, rate-limited."""
        now = time.perf_counter()
        if now - self._shown < (_DRAW_EVERY if self._terminal else _LOG_EVERY):
            return
        self._shown = now
        speed = done / (now - self._began)
        left = (self._total - done) / speed if speed else 0.0
        line = f"{done}/{self._total} images, {speed:.1f} images/s, {left:.0f} s left"
        if self._terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.finish()
        print(line, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Clears the line on a terminal."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
