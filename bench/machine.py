"""What every bench needs: the package, also where it isn't installed, and the machine's name."""

import ast
import importlib
import json
import platform
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


def save(result: dict[str, Any], path: str) -> None:
    """Writes what was measured as JSON; nothing where no file is named."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
