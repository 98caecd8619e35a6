"""Processes in which some packages are not installed."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

# `sys.modules[name] = None` is not absence: einops takes what has a key there for imported, and
# `importlib.util.find_spec`, which etils asks about TensorFlow, raises.
_PRELUDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):  # find_distributions, for importlib.metadata
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(
    absent: Iterable[str],
    program: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs Python code where importing any of `absent` fails; returns what it printed.

    Args:
      absent: top-level packages.
      program: the code.
      *arguments: its `sys.argv[1:]`.
      environment: variables to set beside this process' own.

    Raises:
      AssertionError: the code failed; the message is its stderr.
    """
    command = [sys.executable, "-c", _PRELUDE.format(absent=set(absent)) + program, *arguments]
    done = subprocess.run(
        command,
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
        env=os.environ | dict(environment or {}),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
