"""A config file with its overrides, for commands beside `main.py`, by the same flags.

config = load(["--config=configs/quickstart.py", "--config.pretrain.run.steps=10"])
config.values  # nested dict, for `jobs.parse_job`
"""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:  # nothing here may import JAX: main.py sets things up before that
    from beit_jax.types import Json

# What parsing flags raises for a mistake of the user's.
ERRORS: tuple[type[Exception], ...] = (
    flags.Error,
    KeyError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
    SyntaxError,
)
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
    except OSError as error:  # its lines name the places where the file was looked for
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(" ".join(lines)) from None
    except ERRORS as error:
        raise ConfigError(message_of(error, arguments)) from None
    if len(rest) > 1:
        raise ConfigError(one_line(f"unexpected arguments: {' '.join(rest[1:])}", arguments))
    if settings is None:
        raise ConfigError("--config is missing; try --config=configs/quickstart.py")
    path = config_flags.get_config_filename(values["config"])
    return ConfigFile(name=pathlib.Path(path).stem, values=settings)


def message_of(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong with a command line, in one line, of one of `ERRORS`."""
    # Of a key that the file lacks config_flags raises a KeyError, of a section one in another.
    cause = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(cause, KeyError):
        return _no_such_setting(cause, arguments)
    return one_line(str(error) or repr(error), arguments)


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
