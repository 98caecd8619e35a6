"""A config file with its overrides, for commands beside `main.py`, by the same flags.

config = load(["--config=configs/quickstart.py", "--config.pretrain.run.steps=10"])
config.values  # nested dict, for `jobs.parse_job`
"""

import dataclasses
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:  # nothing here may import JAX: main.py sets things up before that
    from beit_jax.types import Json

_QUOTED = 80  # characters of a name or a value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What a config file says.

    Attributes:
      name: the file's, without its suffix: the default run's directory is `runs/NAME`.
      values: its settings as a nested dict, overrides applied.
    """

    name: str
    values: "dict[str, Json]"


def load(arguments: Sequence[str]) -> ConfigFile:
    """Reads a config file.

    Args:
      arguments: `--config=FILE` and any number of `--config.key=value`, nothing else.

    Raises:
      ConfigError: there is no such file or setting, a value has another type, or ml_collections is
        not installed (the extra [train]); one line.
    """
    from beit_jax.config import ConfigError

    try:
        from ml_collections import config_flags
    except ModuleNotFoundError:
        raise ConfigError(
            "--config: needs ml_collections, which is not installed: pip install 'beit-jax[train]'"
        ) from None
    # The file runs as this module: names that an earlier file left there would be this one's, too.
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    argv = ["beit-jax", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        with warnings.catch_warnings():
            # config_flags imports the file in a way that Python 3.12 is to remove.
            warnings.simplefilter("ignore", DeprecationWarning)
            rest = values(argv)
            # A file that failed to load says so only when it is read.
            settings = None if holder.value is None else holder.value.to_dict()
    except Exception as error:  # the file is a program: it may raise anything
        raise ConfigError(message_of(error, arguments)) from None
    if len(rest) > 1:
        raise ConfigError(one_line(f"unexpected arguments: {' '.join(rest[1:])}", arguments))
    if settings is None:
        raise ConfigError("--config is missing; try --config=configs/quickstart.py")
    path = config_flags.get_config_filename(values["config"])
    return ConfigFile(name=pathlib.Path(path).stem, values=settings)


def message_of(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong with a command line or with the config file, in one line.

    Args:
      error: what parsing the flags raised, or reading the config.
      arguments: the command line.
    """
    path = _path(arguments)
    if path and not os.path.isfile(path):
        return one_line(f"--config: there is no file {path}", arguments)
    if path.endswith(".json"):
        text = f"--config: {path} is JSON, but a config file is Python, as configs/quickstart.py is"
        return one_line(text, arguments)
    raised = _raised_in(path, error)
    if isinstance(error, AttributeError) and error.name == "get_config":
        raised = "which has no function get_config"
    if raised:
        return one_line(f"--config: {path}, {raised}", arguments)
    # Of a key that the file lacks config_flags raises a KeyError, of a section one in another.
    cause = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(cause, KeyError):
        return _no_such_setting(cause, arguments)
    return one_line(str(error) or repr(error), arguments)


def _path(arguments: Sequence[str]) -> str:
    """The config file on a command line, without the argument of its function; "" for none."""
    path = ""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else "".join(arguments[number + 1 : number + 2])
    return path.split(":", 1)[0]


def _raised_in(path: str, error: BaseException | None) -> str:
    """Line, type and text of an exception that came from a file; "" where it came from elsewhere.

    config_flags raises some errors of the file anew, so all that led to this one are looked at.
    """
    found = ""
    while error is not None and path:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if os.path.abspath(frame.filename) == os.path.abspath(path)
        ]
        if isinstance(error, SyntaxError) and error.filename:
            here = os.path.abspath(error.filename) == os.path.abspath(path)
            lines = [error.lineno or 1] if here else lines
        if lines:
            text = error.msg if isinstance(error, SyntaxError) else str(error)
            found = f"line {lines[-1]}: {type(error).__name__}: {text}"
        error = error.__cause__ or error.__context__
    return found


def _no_such_setting(error: KeyError, arguments: Sequence[str]) -> str:
    """The message for an override of a key that the config file lacks, by its full name."""
    key = str(error.args[0]).strip("'\"")
    names = [argument.split("=")[0].lstrip("-") for argument in arguments]
    matching = [name for name in names if key in re.split(r"[.\[\]]", name)]
    name = matching[0] if matching else key
    return f"{name[:_QUOTED]}: no such setting in the config file"


def one_line(message: str, arguments: Sequence[str]) -> str:
    """A message's first line, with at most 80 characters of a value that it quotes."""
    for argument in arguments:
        value = argument.partition("=")[2] or argument
        if len(value) > _QUOTED:
            message = message.replace(value, f"{value[:_QUOTED]}...")
    return next((line for line in message.splitlines() if line.strip()), "an error without a text")
