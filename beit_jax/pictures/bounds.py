"""What the command line's values must keep within, checked before anything is loaded or drawn."""

import argparse
import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator

from beit_jax.config import ConfigError, check
from beit_jax.data import quiet_import

# Options, and their least and largest value; 0 of --grid is its default.
_RANGES = {
    "count": (1, 100_000),
    "seed": (0, 2**32 - 1),
    "grid": (2, 128),
    "mask_count": (1, 128 * 128 - 1),
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # reported as such, with their own exit code


def check_options(options: argparse.Namespace, *, makes_folder: bool = True) -> None:
    """Refuses values that could not work, the output's path among them.

    Args:
      options: of any kind of picture.
      makes_folder: whether missing folders of the output are made.

    Raises:
      ConfigError: names the option; one line.
    """
    check_numbers(options)
    check_output(options.output, makes_folder=makes_folder)


def check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers out of range, and weights without a name; raises as `check_options` does."""
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name, None)
        if value is None or (name == "grid" and value == 0):
            continue
        flag = f"--{name.replace('_', '-')}"
        check(least <= value <= most, flag, f"{value}; must be {least} to {most}")
    check(bool(getattr(options, "weights", "w")), "--weights", "is empty")


def check_output(path: str, *, makes_folder: bool) -> None:
    """Refuses a path that could not be written, by writing a nameless file beside it.

    Raises:
      ConfigError: one line.
      OSError: the disk is full or read-only.
    """
    check(bool(path), "--output", "is empty")
    if "://" in path:
        with naming("--output", path):
            import tensorflow as tf

            tf.io.gfile.exists(path)
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        if not makes_folder:
            check(os.path.isdir(folder), "--output", f"there is no folder {folder}")
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in _DISK:
            raise
        raise ConfigError(f"--output: can't write {path}: {error.strerror}") from None


@contextlib.contextmanager
def naming(option: str, path: str) -> Iterator[None]:
    """Says in one line of `option` that `path` can't be reached, whatever TensorFlow says of it.

    Raises:
      ConfigError: in place of TensorFlow's errors, or where it is not installed.
    """
    if "://" in path:
        quiet_import.tensorflow()  # or its log comes before the one line
    try:
        yield
    except Exception as error:
        # Their classes can't be named here: TensorFlow may not be installed, or not loaded yet.
        foreign = type(error).__module__.startswith("tensorflow")
        if not foreign and not isinstance(error, ModuleNotFoundError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{option}: can't reach {path}: {reason}") from None
