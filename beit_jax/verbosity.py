"""The verbosity of absl's log while a command runs, put back afterwards."""

import contextlib
from collections.abc import Iterator

from absl import logging


@contextlib.contextmanager
def verbosity(level: int) -> Iterator[None]:
    """Sets absl's verbosity; a program that calls a command keeps the one it had.

    Args:
      level: `logging.ERROR`, `logging.INFO`, ...
    """
    before = logging.get_verbosity()
    logging.set_verbosity(level)
    try:
        yield
    finally:
        logging.set_verbosity(before)
