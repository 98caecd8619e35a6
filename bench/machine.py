"""Shared by the benches: the package's path, recipes, processes that answer, results.

The package is found beside this folder where it is not installed.
"""

import ast
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def recipe(config: str, settings: list[str]) -> Any:
    """A ConfigDict of `configs/` with settings of the form "model.layers=2"."""
    values = importlib.import_module(f"configs.{config}").get_config()
    for setting in settings:
        name, text = setting.split("=", 1)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        values.update_from_flattened_dict({name: value})
    return values


def pretraining_task(config: Any) -> Any:
    """The train loop's task of a pre-training config, with the tokenizer's weights."""
    from beit_jax.tasks.pretrain import task_from_config
    from beit_jax.tokenizers.loading import load_params

    return task_from_config(config, tokenizer_params=load_params(config.tokenizer))


class Answering:
    """A process that says hello and then answers every line with a line of JSON.

    Attributes:
      hello: its first line; None where it ended before.
    """

    def __init__(self, command: list[str], *, stderr: int | None = None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        self.hello = self._answer()

    def ask(self, line: Any = "") -> Any:
        """The process' answer to a line; None where it has ended."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def errors(self) -> str:
        """All that it wrote to a piped stderr, once it has ended."""
        return self._process.stderr.read() if self._process.stderr else ""

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save(result: dict[str, Any], path: str) -> None:
    """Writes a result as JSON; writes nothing where no file is named."""
    if path:
        from beit_jax.files import write_json  # after the path is set

        write_json(path, result)
