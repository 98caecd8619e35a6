"""The verbosity of absl's log while a command runs, put back afterwards."""

import contextlib
import logging as python_logging
from collections.abc import Iterator

from absl import logging


@contextlib.contextmanager
def verbosity(level: int) -> Iterator[None]:
    """Sets absl's verbosity; a program that calls a command keeps the one it had.

    Args:
      level: `logging.ERROR`, `logging.INFO`, ...
    """
    before = logging.get_verbosity()
    # A logger without a level of its own follows the root's; setting the verbosity gives it one.
    loggers = (logging.get_absl_logger(), python_logging.getLogger())
    levels = [logger.level for logger in loggers]
    logging.set_verbosity(level)
    try:
        yield
    finally:
        logging.set_verbosity(before)
        for logger, level_before in zip(loggers, levels, strict=True):
            logger.setLevel(level_before)
