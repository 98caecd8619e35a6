"""The command line, and which jobs a config has."""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from absl import logging

from beit_jax import config_file
from beit_jax.config import ConfigError, RunError
from beit_jax.doctor.finding import Finding
from beit_jax.types import Json, JsonObject
from beit_jax.verbosity import verbosity

_WORDS = {"ok": "ok", "skipped": "not checked", "warning": "warning", "wrong": "WRONG"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m beit_jax.doctor",
        description="Checks a config and this machine before a long run: versions, devices,"
        " memory, disk, images, tokens, and a few steps. Nothing is left in the run's directory.",
        epilog="exit code: 0; 1 where something is wrong, 2 where the config can't be read or the\n"
        "run's directory can't be at its path.\n\n"
        "example:\n  python -m beit_jax.doctor --config=configs/quickstart.py"
        " --config.pretrain.run.batch_size=128",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = command.add_argument
    option("--config", metavar="FILE", help="of the run; --config.KEY=VALUE overrides a setting")
    option("--workdir", default="", help="of the run; default: runs/<config name>")
    option(
        "--platform",
        choices=("any", "tpu", "gpu", "cpu"),
        default="any",
        help="that the run requires, as main.py's flag",
    )
    option("--steps", type=int, default=5, metavar="N", help="training steps to time; default: 5")
    option("--seconds", type=float, default=3.0, metavar="N", help="to time reading; default: 3")
    option("--json", action="store_true", help="print the findings as JSON")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; None: the process's own.

    Returns:
      0; 1 where something is wrong, 2 where the config can't be read or the run's directory
      can't be at its path, with one line on stderr.
    """
    options, overrides = parser().parse_known_args(arguments)
    # TensorFlow would log lines for every bad image; 1 is what JAX has set when it was imported.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from beit_jax import jobs
    from beit_jax.training import run_directory

    try:
        if options.steps < 2:
            raise ConfigError(f"--steps: {options.steps}; at least 2 are needed")
        given = [f"--config={options.config}"] if options.config else []
        loaded = config_file.load([*given, *overrides])
        config = jobs.parse_job(loaded.values)
        workdir = options.workdir or f"runs/{loaded.name}"
        run_directory.check_path(workdir)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: list[JsonObject] = []
    try:
        with verbosity(logging.FATAL), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for job, name, finding in examine(config, workdir=workdir, options=options):
                found.append({"job": job, "check": name, **dataclasses.asdict(finding)})
                if not options.json:
                    print(line(job, name, finding), flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    count = {level: sum(one["level"] == level for one in found) for level in _WORDS}
    if options.json:
        print(json.dumps({"config": loaded.name, "counts": count, "findings": found}, indent=2))
    else:
        print(f"{count['wrong']} wrong, {count['warning']} warnings, {count['ok']} ok")
    return 1 if count["wrong"] else 0


def examine(
    config: Json, *, workdir: str, options: argparse.Namespace
) -> Iterator[tuple[str, str, Finding]]:
    """The job's name, the check's and what it found, job after job."""
    from beit_jax.data import quiet_import
    from beit_jax.doctor.checks import run_checks
    from beit_jax.doctor.context import Context

    quiet_import.tensorflow()
    for number, (job, part, folder) in enumerate(jobs_of(config, workdir=workdir)):
        of_several, untrained = part is not config, False
        if of_several and part.task == "pretrain":  # with the tokenizer that the first job trains
            trained = f"{workdir}/tokenizer/tokenizer.safetensors"
            untrained = not os.path.exists(trained)
            settings = {"random_weights": True} if untrained else {"path": trained}
            tokenizer = dataclasses.replace(part.tokenizer, **settings)
            part = dataclasses.replace(part, tokenizer=tokenizer)
        context = Context(
            part,
            workdir=folder,
            platform=options.platform,
            steps=options.steps,
            seconds=options.seconds,
            untrained_tokenizer=untrained,
            weights_come=of_several and job in ("probe", "classify"),
        )
        for name, finding in run_checks(context, machine_too=number == 0):
            yield job, name, finding


def jobs_of(config: Json, *, workdir: str) -> list[tuple[str, Json, str]]:
    """Name, config and directory of each job of a config: the quickstart has several."""
    names = [
        field.name
        for field in dataclasses.fields(config)
        if hasattr(getattr(config, field.name), "task")
    ]
    if not names:
        return [(config.task, config, workdir)]
    # The quickstart's probe and fine-tuning run in several directories each.
    folders = {"probe": "probe_after", "classify": "classify_pretrained_0"}
    return [(name, getattr(config, name), f"{workdir}/{folders.get(name, name)}") for name in names]


def line(job: str, name: str, finding: Finding) -> str:
    """A finding as a line of the report."""
    text = f"{_WORDS[finding.level]:11}  {job}: {name}: {finding.what}"
    return f"{text}; fix: {finding.fix}" if finding.fix else text
