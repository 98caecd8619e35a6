"""The test's end of `peer`."""

import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]


class Peer:
    """A running process of the peers.

    Its stderr is kept in `log`, and shown where the process ends before it answers.
    """

    def __init__(self, log: pathlib.Path):
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.weights.peer_files.peer"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Runs a command of `peer` and returns its answer; fails with the peer's traceback."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        assert answer, f"the peers' process ended:\n{self._log.read_text()[-4000:]}"
        value = json.loads(answer)
        assert "failed" not in value, value["failed"]
        return value

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
