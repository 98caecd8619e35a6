"""Runs the job that a config file describes.

    python main.py --config=configs/quickstart.py
    python main.py --config=configs/beit_large.py --workdir=gs://bucket/run --config.run.seed=1
    python main.py --config=configs/beit_large.py --plan=v4-128  # before renting

The same command again continues the run in `--workdir` (default: runs/<config name>). On several
hosts, start it on each of them; on a Cloud TPU they find each other. Exit code 75 means stopped by
SIGTERM, with a checkpoint saved; 74, that a disk is full or can't be used.
"""

import importlib.metadata
import importlib.util
import logging as python_logging
import os
import pathlib
import signal
import sys
import time
from types import FrameType

_BEGAN = time.perf_counter()  # for the time to the first step: the slow imports come after it


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the program on a signal that comes before there is a run that could save."""
    code, reason = (130, "interrupted") if number == signal.SIGINT else (75, "stopped by SIGTERM")
    os.write(2, f"error: {reason} before the run began; the same command starts it\n".encode())
    os._exit(code)


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(_number) is not signal.SIG_IGN:  # nohup's, say
            signal.signal(_number, _leave)

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from beit_jax import config_file  # noqa: E402

_LOG_LEVEL = os.environ.get("TF_CPP_MIN_LOG_LEVEL")  # before JAX, which sets it to 1

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.key=value overrides a setting."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Checkpoints, metrics and results, local or gs://; default runs/<config name>.",
)
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "TPU slices, v4-128 or v4-8,v6e-8: prints what the run (pre-training, classification or"
    " segmentation) needs there; runs nothing.",
)
_PLAN_PROGRAM = flags.DEFINE_enum(
    "plan_program",
    "full",
    ("full", "shallow"),
    "What --plan compiles: the run's own step, or two shallow models to extrapolate from (faster).",
)
# The fields of `beit_jax.distributed.cluster.Settings`, which documents them.
_CLUSTER = (
    flags.DEFINE_enum("multihost", "auto", ("auto", "yes", "no"), "Join the other hosts' run."),
    flags.DEFINE_string("coordinator_address", "", 'host:port of process 0; "": detected.'),
    flags.DEFINE_integer("num_processes", 0, "Processes of the run; 0: detected.", lower_bound=0),
    flags.DEFINE_integer("process_id", -1, "This process, from 0; -1: detected.", lower_bound=-1),
    flags.DEFINE_enum(
        "platform", "any", ("any", "tpu", "gpu", "cpu"), "Required platform; any other is an error."
    ),
    flags.DEFINE_float("start_timeout", 300.0, "Seconds hosts wait for each other at the start."),
    flags.DEFINE_float("heartbeat_timeout", 100.0, "Seconds until a silent host counts as dead."),
    flags.DEFINE_float("barrier_timeout", 600.0, "Seconds hosts wait for each other later."),
)


def main(argv: list[str]) -> int:
    """Runs the config's job; a wrong setting is a one-line error and exit code 2."""
    if len(argv) > 1:
        return _fail(config_file.one_line(f"unexpected arguments: {' '.join(argv[1:])}", argv))
    try:
        values = _CONFIG.value and _CONFIG.value.to_dict()
    except OSError as error:  # config_flags raises a failure to load when the value is read
        return _fail(config_file.message_of(error, sys.argv))
    if values is None:
        return _fail("--config is missing; try --config=configs/quickstart.py")
    if _only_cpu():
        from beit_jax.training.memory import keep_freed

        keep_freed()  # before JAX is imported
    # Imported here so that a wrong flag is reported without waiting for JAX.
    from beit_jax import jobs
    from beit_jax.training import startup

    if _LOG_LEVEL is None:
        # JAX has taken its level by now. TensorFlow, imported later, would log some lines for every
        # image that it can't decode; the run itself names and counts these.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

    startup.count_from(_BEGAN)

    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    if _PLAN.value is not None:
        return _plan(values, workdir=_WORKDIR.value or f"runs/{name}")
    if signal.getsignal(signal.SIGINT) is _leave:  # from here on `run_on_cluster` answers
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return jobs.run_on_cluster(
        values,
        workdir=_WORKDIR.value or f"runs/{name}",
        cluster_settings={flag.name: flag.value for flag in _CLUSTER},
    )


def _only_cpu() -> bool:
    """Whether the run certainly uses CPUs: the user says so, or JAX has no other backend."""
    platform = next(flag.value for flag in _CLUSTER if flag.name == "platform")
    if "cpu" in (platform, os.environ.get("JAX_PLATFORMS")):
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def _plan(values: dict, *, workdir: str) -> int:
    from beit_jax import jobs, storage
    from beit_jax.config import ConfigError, RunError
    from beit_jax.planning import plan, slices
    from beit_jax.training import run_directory

    try:
        run_directory.check_path(workdir)
        wanted = slices.parse_slices(_PLAN.value)
        config = jobs.parse_job(values)
        plan.run(config, slices=wanted, program=_PLAN_PROGRAM.value, workdir=workdir)
        storage.flush_output()
    except Exception as error:
        code = storage.failed(error)
        if code is None and not isinstance(error, ConfigError | RunError):
            raise
        return code or _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags with absl; a traceback of config_flags becomes a one-line error."""
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # the config file is a program: it may raise anything
        sys.exit(_fail(config_file.message_of(error, argv)))
    if _WORKDIR.value is not None and not _WORKDIR.value.strip():
        sys.exit(_fail("--workdir: is empty; leave it out for runs/<config name>"))
    _set_up_logging()
    return rest


def _set_up_logging() -> None:
    """Logs time and message; of libraries only warnings, since orbax alone logs pages."""
    logging.use_absl_handler()
    if logging.get_verbosity() < logging.INFO:
        logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    package = str(pathlib.Path(__file__).parent / "beit_jax")
    handler.addFilter(
        lambda record: (
            record.levelno >= python_logging.WARNING or record.pathname.startswith(package)
        )
    )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
