"""Runs the job a config file describes.

    python main.py --config=configs/quickstart.py
    python main.py --config=configs/beit_large.py --workdir=gs://bucket/run --config.run.seed=1

The same command again continues the run in `--workdir` (default: runs/<config name>).
"""

import logging as python_logging
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.key=value overrides a setting."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, metrics and results, local or gs://; runs/<config name>."
)


def main(argv: list[str]) -> int:
    """Parses the config, runs its job; a setting that is wrong is one line and exit code 2."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        values = _CONFIG.value and _CONFIG.value.to_dict()
    except OSError as error:  # config_flags keeps a failure to load until the value is asked for
        return _fail(" ".join(line.strip() for line in str(error).splitlines()))
    if values is None:
        return _fail("--config is missing; try --config=configs/quickstart.py")
    # After the flags: an unknown one should not wait for JAX to be imported.
    from beit_jax import jobs
    from beit_jax.config import ConfigError, RunError
    from beit_jax.tokenizers.loading import TokenizerFileError

    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        jobs.run(values, workdir=_WORKDIR.value or f"runs/{name}")
    except (ConfigError, TokenizerFileError, FileNotFoundError, RunError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with config_flags' tracebacks turned into the line that matters."""
    try:
        rest = flags.FLAGS(argv)
    except KeyError as error:  # config_flags: an override of a key that isn't there
        key = error.args[0]
        named = [each.split("=")[0] for each in argv if each.split("=")[0].endswith(f".{key}")]
        sys.exit(_fail(f"{' '.join(named) or key}: no such setting in the config file"))
    except (flags.Error, AttributeError, TypeError, ValueError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        sys.exit(_fail(lines[0] if lines else repr(error)))
    _set_up_logging()
    return rest


def _set_up_logging() -> None:
    """Time and message; from libraries only warnings, since orbax alone writes pages."""
    logging.use_absl_handler()
    if logging.get_verbosity() < logging.INFO:
        logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = str(pathlib.Path(__file__).parent / "beit_jax")
    handler.addFilter(
        lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)
    )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
