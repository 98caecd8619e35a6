"""Imports TensorFlow without its greetings.

quiet_import.tensorflow()  # before anything else imports it
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

# Printed before TensorFlow reads its log's level, so no level silences them; each run twice.
_GREETINGS = (
    b"WARNING: All log messages before absl::InitializeLog()",
    b"oneDNN custom operations",
)


def tensorflow() -> None:
    """Imports TensorFlow, where it is installed.

    What is written to stderr meanwhile follows afterwards, without the greetings. With
    TF_CPP_MIN_LOG_LEVEL=0 everything is shown as it comes. The operations that the greetings are
    about stay on: without them a continued run's images could differ in their last bits.
    """
    if "tensorflow" in sys.modules or importlib.util.find_spec("tensorflow") is None:
        return
    shown = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
    with contextlib.nullcontext() if shown else _without(_GREETINGS):
        importlib.import_module("tensorflow")


@contextlib.contextmanager
def _without(texts: tuple[bytes, ...]) -> Iterator[None]:
    """Holds stderr back, also that of C++, and then writes all lines but those with a text."""
    try:
        held = tempfile.TemporaryFile()  # noqa: SIM115
        before = os.dup(2)
    except OSError:  # a full disk, or stderr is closed
        yield
        return
    with held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            lines = [line for line in held if not any(text in line for text in texts)]
            sys.stderr.write(b"".join(lines).decode(errors="replace"))
