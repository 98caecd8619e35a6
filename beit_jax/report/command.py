"""The command line: `python -m beit_jax.report RUN [RUN ...] --output=report.html`."""

import argparse
import importlib.util
import os
import sys

from beit_jax.config import check
from beit_jax.features.command import reporting
from beit_jax.files import printable, write_whole

_NEEDED = ("plotly", "jinja2")  # the extra [report]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m beit_jax.report",
        description="Writes one HTML file about runs: curves with what to compare them with, what"
        " looks wrong and what to do about it, settings and their differences, pictures. It needs"
        " no network to be read.",
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's directory, local or gs://, or a folder of runs; several are compared",
    )
    command.add_argument("--output", required=True, metavar="FILE", help="the .html file to write")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, as `features.command.reporting` says."""
    options = parser().parse_args(arguments)
    return reporting(lambda: write(options.runs, options.output), interrupted="nothing was written")


def write(runs: list[str], output: str) -> None:
    """Writes the report.

    Args:
      runs: directories, local or gs://.
      output: the file's path.

    Raises:
      ConfigError: there is no run, a package is missing, or the output can't be a file.
    """
    for name in _NEEDED:
        check(
            importlib.util.find_spec(name) is not None,
            "report",
            f"needs {name}, which is not installed: pip install 'beit-jax[report]'",
        )
    check("://" not in output, "--output", f"{printable(output)} is no local file")
    folder = os.path.dirname(os.path.abspath(output))
    check(output.endswith((".html", ".htm")), "--output", f"{printable(output)} is no .html file")
    check(not os.path.isdir(output), "--output", f"{printable(output)} is a folder")
    check(os.path.isdir(folder), "--output", f"there is no folder {printable(folder)}")
    # Plotly is imported here, after it is known to be there.
    from beit_jax.report.page import page
    from beit_jax.report.reading import read_runs, shown

    found = read_runs(runs)
    title = ", ".join(shown(os.path.basename(os.path.abspath(each))) for each in runs[:3])
    title += f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    write_whole(output, page(found, title=title).encode())
    print(f"wrote {printable(output)}, about {len(found)} run(s)", file=sys.stderr)
