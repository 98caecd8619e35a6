"""Makes faults for hours and prints a table: tried, survived, and a line for every other outcome.

    python bench/soak.py [--parts=kill,bits] [--scale=1.0] [--seed=0] [--json=FILE]

What a part does, and what counts as survived, is in `tests/faults/PART.py`, whose test runs a small
version of it. `--scale=0.1` tries a tenth. A part prints its row when it ends; the full version of
all of them takes hours, and a fault in a run (kill, disk, hosts) a minute or more on two cores. The
exit code is 1 where something did not survive.
"""

import argparse
import importlib
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import processor_name, save  # beside this file

# How much the full version tries, by the module in tests/faults.
PARTS = {
    "kill": 100,
    "disk": 60,
    "bits": 600,  # 420 of them in checkpoints
    "numbers": 200,
    "memory": 30,  # minutes
    "hosts": 40,
    "data": 5_000,
    "supply": 3,
    "directory": 192,
    "hostile": 2_000,  # calls
    "settings": 100_000,
}


def main() -> None:
    """Runs the parts one after the other; prints the table, and failures as they are found."""
    full = "  ".join(f"{name} {count:,}" for name, count in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"The full version's faults: {full} (memory: minutes).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which; all by default")
    parser.add_argument("--scale", type=float, default=1.0, help="times the full version's faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' moments and places")
    parser.add_argument("--folder", default=None, help="where to write; the system's temporary one")
    parser.add_argument("--json", default="", help="a file for the results")
    flags = parser.parse_args()
    names = [name for name in flags.parts.split(",") if name]
    if not names:
        parser.error(f"--parts: names none; there are {', '.join(PARTS)}")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not flags.scale > 0:
        parser.error(f"--scale: must be positive, not {flags.scale}")

    counts = {name: max(1, round(PARTS[name] * flags.scale)) for name in names}
    rows = []
    for name in names:
        print(f"{name}: {counts[name]} to try", flush=True)
        row = run_part(
            name,
            count=counts[name],
            seed=flags.seed,
            folder=flags.folder,
        )
        rows.append(row)
        print(f"{name}: {row['survived']} of {row['tried']}, {row['seconds']:.0f} s", flush=True)
        for failure in row["failures"]:
            print(f"  {failure}", flush=True)
    print(table(rows))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor_name(),
        "python": platform.python_version(),
        "seed": flags.seed,
        "rows": rows,
    }
    save(result, flags.json)
    sys.exit(any(row["survived"] < row["tried"] for row in rows))


def run_part(name: str, *, count: int, seed: int, folder: str | None) -> dict[str, Any]:
    """One part's row, with its seconds.

    Args:
      name: of `PARTS`.
      count: faults to make.
      seed: of their moments and places.
      folder: where a part's own folder is made; None: the system's temporary one.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    part = importlib.import_module(f"tests.faults.{name}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"beit_jax_soak_{name}_", dir=folder) as own:
        row = part.soak(count=count, seed=seed, folder=Path(own))
    return {
        "part": row.part,
        "tried": row.tried,
        "survived": row.survived,
        "failures": list(row.failures),
        "note": row.note,
        "seconds": time.perf_counter() - began,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| part | tried | as promised | |", "|---|---:|---:|---|"]
    for row in rows:
        lines.append(f"| {row['part']} | {row['tried']:,} | {row['survived']:,} | {row['note']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    # Ended like Ctrl-C, so that no folder is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
