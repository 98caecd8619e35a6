"""Runs killed at random moments and continued end as if nothing had happened, bit for bit.

A program is started, killed (SIGKILL) or told to stop (SIGTERM) somewhere, and started again by
the same command, until it has been hit a few times; then it is left to end. It has survived if it
ends well, and every array of its newest checkpoint, the best parameters, its results and
`metrics.jsonl`, speeds apart, are those of a run that was left alone.
"""

import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from beit_jax.weights import native
from tests.distributed import processes
from tests.faults.row import Row
from tests.faults.zygote import TRAINING, Forked, Zygote

HITS = 3  # of a run, before it is left to end
PATIENCE = 240.0
# Of this process alone, or of time: a run that was continued has others.
ITS_OWN = ("second", "data_wait_share", "mfu", "tokenized_images", "images_with_known_tokens")
RUN = {"steps": 24, "checkpoint_every": 3, "eval_every": 4, "picture_every": 4, "log_every": 1}


class NotSurvivedError(Exception):
    """A run did not end as promised; the message says how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A program that writes a run's directory.

    Attributes:
      program: `main.py` or a module.
      words: `workdir -> ` its command line.
      count: of processes, each of which gets flags of its own.
      lines: of the finished `metrics.jsonl`, to choose moments by.
    """

    program: str
    words: Callable[[Path], tuple[str, ...]]
    count: int = 1
    lines: int = RUN["steps"] + RUN["steps"] // RUN["eval_every"]

    def start(self, zygote: Zygote, workdir: Path) -> list[Forked]:
        """Its processes."""
        if self.count == 1:
            return [zygote.run(self.program, *self.words(workdir))]
        port = processes.free_port()
        return [
            zygote.run(
                self.program,
                *self.words(workdir),
                f"--coordinator_address=127.0.0.1:{port}",
                f"--num_processes={self.count}",
                f"--process_id={index}",
                "--heartbeat_timeout=15",
                "--start_timeout=60",
            )
            for index in range(self.count)
        ]


def _job(name: str, *, count: int = 1, **settings: object) -> Command:
    settings = {f"run__{key}": value for key, value in RUN.items()} | settings
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return Command(
        program="main.py",
        words=lambda workdir: (
            f"--config=tests/tasks/tiny.py:{name}",
            f"--workdir={workdir}",
            *flags,
        ),
        count=count,
    )


# With the share of the moments that each gets.
COMMANDS: dict[str, tuple[Command, float]] = {
    "pre-training": (_job("pretrain"), 0.3),
    "token cache": (_job("pretrain", data__augmentation_cycle=2), 0.15),
    "two processes": (_job("pretrain", count=2), 0.2),
    "tokenizer": (_job("tokenizer"), 0.1),
    "fine-tuning": (_job("classify", run__picture_every=0), 0.15),
}
# The rest of the moments: a format and the name of its output. (unilm's needs PyTorch, which does
# not go into one process with TensorFlow.)
EXPORTS = {
    "hugging_face": "weights",
    "timm": "weights.safetensors",
    "stablehlo": "weights.stablehlo",
}


def regression(**changes: object) -> Command:
    """A run that compiles in a second and needs no TensorFlow."""
    run = {f"run__{key}": value for key, value in RUN.items() if key != "picture_every"}
    config = processes.values(**run) | {"step_seconds": 0.02, "evaluation_seconds": 0.02} | changes
    return Command(
        program="tests.distributed.worker",
        words=lambda workdir: (
            json.dumps({"values": config, "workdir": str(workdir), "cluster": {}}),
        ),
    )


def soak(*, count: int, seed: int, folder: Path, kinds: Sequence[str] = tuple(COMMANDS)) -> Row:
    """Kills programs of every kind.

    Args:
      count: moments.
      seed: of the moments.
      folder: for runs and output.
      kinds: of `COMMANDS`; "pre-training" must be among them.
    """
    random = np.random.default_rng(seed)
    failures: list[str] = []
    tried: dict[str, int] = {}
    with Zygote(modules=TRAINING, folder=folder / "output") as zygote:
        for name in kinds:
            command, share = COMMANDS[name]
            hits = max(1, round(count * share))
            found, done = try_command(command, zygote, folder / name, hits=hits, random=random)
            failures += [f"{name}, seed {seed}: {failure}" for failure in found]
            tried[name] = done
        hits = max(1, count - sum(tried.values()))
        source = folder / "pre-training" / "straight"
        failures += try_exports(source, zygote, folder / "export", hits=hits, random=random)
        tried["export"] = hits
    return Row(
        part="kill",
        tried=sum(tried.values()),
        survived=sum(tried.values()) - len(failures),
        failures=tuple(failures),
        note=", ".join(f"{name} {number}" for name, number in tried.items()),
    )


def try_command(
    command: Command, zygote: Zygote, folder: Path, *, hits: int, random: np.random.Generator
) -> tuple[list[str], int]:
    """Hits runs until that was done `hits` times.

    Returns:
      What went wrong, one line for each run; how often runs were hit.
    """
    straight, failures, done = folder / "straight", [], 0
    began = time.monotonic()
    _finish(command.start(zygote, straight))
    seconds = time.monotonic() - began
    while done < hits:
        workdir, story = folder / f"hit at {done}", []
        try:
            for _ in range(min(HITS, hits - done)):
                if not _hit(command, zygote, workdir, seconds, random, story):
                    break
                done += 1
            _finish(command.start(zygote, workdir))
            compare(straight, workdir)
            shutil.rmtree(workdir)
        except (NotSurvivedError, TimeoutError) as error:
            failures.append(f"{error}; {', '.join(story)}; {workdir}")
        if not story:
            done += 1  # never met it: counted as tried, so that this ends
    return failures, done


def _hit(
    command: Command,
    zygote: Zygote,
    workdir: Path,
    seconds: float,
    random: np.random.Generator,
    story: list[str],
) -> bool:
    """Starts the run and ends it at some moment; False where it was over before."""
    started = command.start(zygote, workdir)
    number = signal.SIGKILL if random.random() < 0.6 else signal.SIGTERM
    victim = int(random.integers(command.count))
    moment = _wait_for_moment(started[victim], command, workdir, seconds, random)
    if started[victim].exit_code() is not None:
        _check_codes(started, {0})
        return False
    story.append(f"{number.name} to process {victim} {moment}")
    started[victim].kill(number)
    killed = number == signal.SIGKILL
    code = started[victim].wait(timeout=PATIENCE)
    # It may be through with its work, or, at the very start, not have asked for the signal yet.
    codes = (0, -number) if killed else (0, 75, -number)
    _check(code in codes, f"exit code {code}", started[victim])
    lost = code in (-signal.SIGKILL, -signal.SIGTERM)
    for other in (one for index, one in enumerate(started) if index != victim):
        code = other.wait(timeout=PATIENCE)
        _check(code in (0, 69 if lost else 75), f"exit code {code} of the other", other)
    return True


def _wait_for_moment(
    run: Forked, command: Command, workdir: Path, seconds: float, random: np.random.Generator
) -> str:
    """Until some time since the start, or shortly after some line of the log; returns which."""
    log, delay = workdir / "metrics.jsonl", float(random.uniform(0, seconds))
    text = f"after {delay:.3f} s"
    if random.random() < 0.6:
        # Start-up takes most of the time; between two lines there are evaluations, checkpoints and
        # pictures. A log that is longer already is met at its next line.
        wanted = int(random.integers(1, command.lines + 1))
        while run.exit_code() is None:
            if line_count(log) >= wanted and log.stat().st_mtime > run.began:
                break
            time.sleep(0.001)
        delay = float(random.exponential(0.05))
        text = f"{delay:.3f} s after line {wanted}"
    began = time.monotonic()
    while run.exit_code() is None and time.monotonic() - began < delay:
        time.sleep(0.001)
    return text


def line_count(path: Path) -> int:
    """Of a log; 0 where it is missing."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def try_exports(
    source: Path, zygote: Zygote, folder: Path, *, hits: int, random: np.random.Generator
) -> list[str]:
    """Kills exports: each file is then whole or not there, and a second try makes all of them."""
    failures = []
    wanted: dict[str, tuple[dict[str, bytes], float]] = {}
    for number in range(hits):
        format = [*EXPORTS][number % len(EXPORTS)]

        def start(folder: Path, format: str = format) -> Forked:
            output = f"--output={folder / EXPORTS[format]}"
            words = ("export", str(source), f"--format={format}", output)
            return zygote.run("beit_jax.weights", *words)

        if format not in wanted:
            began = time.monotonic()
            _finish([start(folder / format)])
            wanted[format] = (_files(folder / format), time.monotonic() - began)
        files, seconds = wanted[format]
        moment = float(random.uniform(0, seconds))
        output = folder / f"{format} {number}"
        try:
            run = start(output)
            time.sleep(moment)
            run.kill()
            run.wait()
            for name, content in _files(output).items():
                if content != files.get(name):
                    raise NotSurvivedError(f"{name} is not whole")
            _finish([start(output)])
            if _files(output) != files:
                raise NotSurvivedError("another export")
        except (NotSurvivedError, TimeoutError) as error:
            failures.append(f"export of {format} killed after {moment:.3f} s: {error}")
    return failures


def _files(folder: Path) -> dict[str, bytes]:
    """Content by name; a kill leaves temporary files, which no reader takes for anything."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"
    }


def _finish(started: list[Forked]) -> None:
    for run in started:
        code = run.wait(timeout=PATIENCE)
        _check(code == 0, f"exit code {code} at the end", run)


def _check_codes(started: list[Forked], codes: set[int]) -> None:
    for run in started:
        code = run.wait(timeout=PATIENCE)
        _check(code in codes, f"exit code {code}", run)


def _check(good: bool, message: str, run: Forked) -> None:
    if not good:
        said = run.output().strip().splitlines()
        raise NotSurvivedError(f"{message} ({said[-1] if said else 'it said nothing'})")


def compare(straight: Path, workdir: Path) -> None:
    """Raises NotSurvivedError where a run's directory differs from the straight one's."""
    for part in ("", "best"):
        if not (straight / part / "checkpoints").exists():
            continue
        if not (workdir / part / "checkpoints").exists():
            raise NotSurvivedError(f"no {part or 'checkpoint'}")
        wanted, found = (processes.saved_state(folder / part) for folder in (straight, workdir))
        if [str(path) for path, _ in wanted] != [str(path) for path, _ in found]:
            raise NotSurvivedError(f"other arrays in {part or 'the checkpoint'}")
        for (path, a), (_, b) in zip(wanted, found, strict=True):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                raise NotSurvivedError(f"{path} of {part or 'the checkpoint'} differs")
    notes = [
        native.saved_config(str(p / "best")) for p in (straight, workdir) if (p / "best").exists()
    ]
    if notes and notes[0]["best"] != notes[1]["best"]:
        raise NotSurvivedError(f"best: {notes[1]['best']} instead of {notes[0]['best']}")
    wanted, found = ([*metrics_lines(folder)] for folder in (straight, workdir))
    for one, other in zip(wanted, found, strict=False):
        if one != other:
            raise NotSurvivedError(f"metrics.jsonl has {other} instead of {one}")
    if len(wanted) != len(found):
        raise NotSurvivedError(f"metrics.jsonl has {len(found)} lines instead of {len(wanted)}")
    for name in ("tokenizer.safetensors", "reconstruction.png"):
        contents = [
            p.read_bytes() if (p := d / name).exists() else b"" for d in (straight, workdir)
        ]
        if contents[0] != contents[1]:
            raise NotSurvivedError(f"{name} differs")


def metrics_lines(workdir: Path) -> Iterator[dict]:
    """As they are in the file, without what is of time or of one process."""
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        yield {k: v for k, v in values.items() if not any(word in k for word in ITS_OWN)}
