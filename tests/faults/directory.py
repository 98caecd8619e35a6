"""Run directories with damaged, foreign and missing files, of a run that is then continued.

A fault is survived if the run is refused by one line that names the file, which is then as it was;
or if it goes on to the result that it would have had, with every step of its log once, and what was
in the damaged file is still in the directory under some name.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from beit_jax import jobs
from beit_jax.config import ConfigError, RunError
from tests.faults.row import Row
from tests.tasks import how_to_add_task_test as toy

STEPS, MORE = 2, 3  # of the run, and of its continuation
# The newest checkpoint's own record of its settings is one of the run's files, too.
RECORD = f"checkpoints/{STEPS}/config/metadata"
FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "start.json",
    "evaluation.json",
    "run.lock",
    RECORD,
)
CONTENTS = {
    "empty": b"",
    "zeros": b"\0" * 300,
    "binary": bytes(range(256)) * 8,
    "latin-1": b'{"run": "caf\xe9"}\n',
    "list": b"[1, 2, 3]\n",
    "number": b"7\n",
    "nested": b"[" * 200_000,
    "huge number": b'{"step": ' + b"9" * 10_000 + b"}\n",
    "another program's": b'{"model_type": "beit", "loss": 0.5}\n',
    "line without a step": b'{"step": 1, "loss": 1.0}\n{"loss": 2.0}\n',
}
PLACES = ("half", "missing", "folder", "pipe", "link to nothing", "link to itself")
CASES = [(file, damage) for file in FILES for damage in (*CONTENTS, *PLACES)]
# Nothing of these is worth keeping, or the file itself may be lost (`missing`).
WORTHLESS = ("empty", "zeros", "missing")


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Continues `count` damaged run directories, all kinds in an order drawn with `seed`."""
    random = np.random.default_rng(seed)
    cases = []
    while len(cases) < count:
        cases += [CASES[index] for index in random.permutation(len(CASES))]
    return try_all(cases[:count], folder=folder)


def settings(*, steps: int) -> dict:
    """A job that compiles in no time and has every file."""
    values = toy.values()
    values["run"] |= {"steps": steps, "checkpoint_every": 1, "eval_every": 0, "picture_every": 0}
    return values


@contextlib.contextmanager
def toy_job() -> Iterator[None]:
    """The job's row in the table."""
    jobs.JOBS["toy"] = jobs.JobKind(toy.ColourConfig, toy.run)
    try:
        yield
    finally:
        del jobs.JOBS["toy"]


def try_all(cases: list[tuple[str, str]], *, folder: Path) -> Row:
    """Damages a copy of a run's directory for each case (file, damage), and continues it."""
    whole = folder / "whole"
    failures, refused = [], 0
    with toy_job():
        jobs.run(settings(steps=STEPS), workdir=str(whole))
        (whole / "evaluation.json").write_text(json.dumps({"steps": STEPS}))
        for number, (file, damage) in enumerate(cases):
            workdir = folder / f"run_{number}"
            shutil.copytree(whole, workdir)
            try:
                refused += try_one(workdir, file=file, damage=damage)
            except Exception as error:  # whatever is raised is a line of the table
                text = " ".join(str(error).split())[:200]
                failures.append(f"{file}, {damage}: {type(error).__name__}: {text}")
            shutil.rmtree(workdir)
    note = f"refused by one line {refused}, went on {len(cases) - len(failures) - refused}"
    survived = len(cases) - len(failures)
    return Row(
        part="directory",
        tried=len(cases),
        survived=survived,
        failures=tuple(failures),
        note=note,
    )


def try_one(workdir: Path, *, file: str, damage: str) -> bool:
    """Damages one file and continues the run; whether it was refused.

    Raises:
      AssertionError: the outcome is none of those that are promised.
      Exception: the run ended with something else than a line.
    """
    path = workdir / file
    make(path, damage)
    content = path.read_bytes() if path.is_file() else None
    kind = kind_of(path)
    try:
        summary = jobs.run(settings(steps=MORE), workdir=str(workdir))
    except (ConfigError, RunError) as error:
        line = str(error)
        assert len(line.splitlines()) == 1, f"not one line: {line}"
        assert len(line) < 500, f"a line of {len(line)} characters"
        assert path.name in line, f"names no file: {line}"
        assert kind_of(path) == kind, "refused, and replaced all the same"
        assert content is None or path.read_bytes() == content, "refused, and changed"
        return True
    check_end(workdir, summary=summary)
    # The log keeps its own lines, and the checkpoint is replaced by newer ones in the end.
    if content and damage not in WORTHLESS and file not in (RECORD,):
        understood = file == "metrics.jsonl" and damage == "half"
        kept = understood or any(one.read_bytes() == content for one in files(workdir))
        assert kept, "what was in the file is lost"
    return False


def check_end(workdir: Path, *, summary: dict) -> None:
    """What a run has that went on: its results, and each step of its log once."""
    assert summary["steps"] == MORE
    assert json.loads((workdir / "summary.json").read_text())["steps"] == MORE
    recorded = jobs.parse_job(json.loads((workdir / "config.json").read_text()))
    assert recorded == jobs.parse_job(settings(steps=MORE))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "learning_rate" in line]
    assert steps == sorted(set(steps)), f"steps {steps}"
    assert steps[-1] == MORE
    assert (workdir / "colours.png").exists()
    assert not (workdir / "run.lock").exists()


def make(path: Path, damage: str) -> None:
    """Puts the damage in a file's place."""
    content = path.read_bytes() if path.exists() else b'{"steps": 1, "run": {"steps": 1}}'
    path.unlink(missing_ok=True)
    if damage in CONTENTS:
        path.write_bytes(CONTENTS[damage])
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        path.mkdir()
        (path / "note").write_text("somebody's")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage.startswith("link"):
        path.symlink_to("nothing" if damage == "link to nothing" else path.name)


def kind_of(path: Path) -> int | None:
    """The kind of what is at a path; None for nothing."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_mode
    return None


def files(folder: Path) -> Iterator[Path]:
    """All regular files under a folder."""
    return (path for path in folder.rglob("*") if path.is_file())
