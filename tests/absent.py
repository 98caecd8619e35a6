"""Processes in which some packages are not installed."""

import subprocess
import sys
from collections.abc import Iterable

# `sys.modules[name] = None` is not absence: einops takes what has a key there for imported, and
# `importlib.util.find_spec`, which etils asks about TensorFlow, raises.
_PRELUDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(absent: Iterable[str], program: str, *arguments: str) -> str:
    """Runs Python code where importing any of `absent` fails; returns what it printed.

    Args:
      absent: top-level packages.
      program: the code.
      *arguments: its `sys.argv[1:]`.

    Raises:
      AssertionError: the code failed; the message is its stderr.
    """
    command = [sys.executable, "-c", _PRELUDE.format(absent=set(absent)) + program, *arguments]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
