"""The `beit-jax` command: one entry point for what the package's modules do.

    beit-jax export runs/beit_base --format hugging_face --output exported
    beit-jax features photos --weights=exported --output=features.npz
    python -m beit_jax.cli --help

A sub-command passes its arguments on to the module it is named beside below, which stays callable
as `python -m MODULE`. Only that module is imported. (Training is `python main.py` in a checkout:
its configurations are files there, not part of the package.)
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A sub-command.

    Attributes:
      module: the module that runs it; its `main(arguments)` returns the exit code.
      prefix: arguments of that module that come before the user's.
      summary: one line for `--help`.
      extra: the extra that it needs, as in `pip install beit-jax[train]`; "" for none.
    """

    module: str
    summary: str
    prefix: tuple[str, ...] = ()
    extra: str = ""


def _weights(command: str, summary: str) -> Command:
    return Command(module="beit_jax.weights.__main__", prefix=(command,), summary=summary)


COMMANDS = {
    "export": _weights("export", "write a checkpoint for Hugging Face, timm, unilm and others"),
    "import": _weights("import", "read a foreign file or folder into a checkpoint of this project"),
    "convert-tokenizer": _weights("convert-tokenizer", "write DALL-E's weights as one file"),
    "inspect": _weights("inspect", "print what a checkpoint or a file of weights holds"),
    "features": Command(
        module="beit_jax.features",
        summary="write the features of a folder of images to .npz or Parquet",
    ),
    "segment": Command(
        module="beit_jax.segment",
        summary="paint a folder of images with the classes of their pixels",
    ),
    "pictures": Command(
        module="beit_jax.pictures.command",
        summary="draw what a model attends to and what it separates",
    ),
    "report": Command(
        module="beit_jax.report.command",
        summary="write one HTML file about a run, or compare several",
        extra="report",
    ),
    "prepare": Command(
        module="beit_jax.data.prepare",
        summary="store a data set as smaller JPEGs, read at random",
        extra="train",
    ),
    "doctor": Command(
        module="beit_jax.doctor",
        summary="check a config and this machine before a long run",
        extra="train",
    ),
    "service": Command(
        module="beit_jax.data.service",
        summary="make training batches on this machine for others",
        extra="train",
    ),
}


def usage() -> str:
    """What `beit-jax --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: beit-jax COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            "`beit-jax COMMAND --help` explains one; `beit-jax --version` prints the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
      arguments: of the command line, without the program's name; None takes `sys.argv`.

    Returns:
      The exit code: the sub-command's; 2 where there is no such command, or a package that it needs
      is not installed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    name, *rest = given
    if name == "--version":
        import beit_jax

        print(beit_jax.__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").startswith("beit_jax"):
            raise
        print(
            f"error: {name} needs {error.name}, which is not installed:"
            f" pip install 'beit-jax[{command.extra}]'",
            file=sys.stderr,
        )
        return 2
    return module.main([*command.prefix, *rest]) or 0


if __name__ == "__main__":
    sys.exit(main())
