"""Disks that become full, forbidden or limited, at a chosen moment of a run or a command.

Everything happens on a file system in memory that a process with mounts of its own has (`unshare`),
in forks of it that call the program's `main`. A fault is survived if the program ends with exit
code 74 and one line that names the path and says what is safe, leaves no half checkpoint, and the
same command, once the disk is as before, gives the result of a run without a fault: every line of
`metrics.jsonl` once, every file that is there at the end. Faults that a program can do without must
not end it.
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.compiling import QUICKLY
from tests.faults.row import Row

ROOT = Path(__file__).parent.parent.parent
CODE = 74
# Differ from run to run.
TIMES = ("images_per_second", "data_wait_share", "seconds", "time_to_first_step", "mfu")

# The moments of a run: what is called then, and at which call of it.
MOMENTS: dict[str, tuple[str, str, int]] = {
    "start": ("beit_jax.training.run_directory", "check_contents", 1),
    "config": ("beit_jax.training.checkpoint", "Checkpoints.write_config", 1),
    "first picture": ("beit_jax.drawing.sheets", "save_png", 1),
    "first line": ("beit_jax.training.metrics", "MetricsLog.write", 1),
    "line": ("beit_jax.training.metrics", "MetricsLog.write", 6),
    "first save": ("beit_jax.training.checkpoint", "Checkpoints.save", 1),
    "save": ("beit_jax.training.checkpoint", "Checkpoints.save", 2),
    "last save": ("beit_jax.training.checkpoint", "Checkpoints.save", 3),
    "best": ("beit_jax.training.checkpoint", "Checkpoints.save_best", 1),
    "evaluation": ("beit_jax.training.loop", "TrainingRun.evaluate", 1),
    "end": ("beit_jax.training.loop", "TrainingRun.close", 1),
    "summary": ("beit_jax.tasks.run_job", "summarize", 1),
    "last picture": ("beit_jax.drawing.sheets", "save_png", 2),
    "tokenizer": ("beit_jax.tasks.tokenizer", "save_params", 1),
}
JOBS = {
    "pretrain": set(MOMENTS) - {"best", "tokenizer"},
    "classify": set(MOMENTS) - {"first picture", "last picture", "tokenizer"},
    "tokenizer": set(MOMENTS) - {"best"},
}
SETTINGS = ("--config.run.checkpoint_every=4", "--config.run.eval_every=5")


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Makes `count` faults at moments and of kinds drawn with `seed`."""
    return try_all(draw(count, seed=seed), folder=folder)


def draw(count: int, *, seed: int) -> list[dict]:
    """Cases for `try_all`: every third is a command's, the others a run's."""
    random = np.random.default_rng(seed)
    cases: list[dict] = []
    runs = [(job, moment) for job, moments in JOBS.items() for moment in sorted(moments)]
    order = random.permutation(len(runs))
    for number in range(count):
        if number % 3 == 2:
            name = list(COMMANDS)[number // 3 % len(COMMANDS)]
            left = int(random.choice([0, 4096, int(random.integers(8_000, 40_000))]))
            kind = str(random.choice(["full", "read-only"], p=[0.8, 0.2]))
            cases.append({"command": name, "kind": kind, "left": left})
            continue
        job, moment = runs[order[number % len(runs)]]
        kind = str(random.choice(list(KINDS), p=[0.7, 0.15, 0.15]))
        left = int(random.choice([0, int(random.integers(1, 300_000))]))
        cases.append({"job": job, "moment": moment, "kind": kind, "left": left})
    return cases


def try_all(cases: list[dict], *, folder: Path) -> Row:
    """Tries the cases, one after the other, in a process with mounts of its own.

    Args:
      cases: from `draw`: `{"job", "moment", "kind", "left"}` or `{"command", "kind", "left"}`.
      folder: where file systems are mounted, and what the cases need is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": QUICKLY,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.faults.disk", str(folder)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    try:
        failures = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}") from None
    commands = sum("command" in case for case in cases)
    return Row(
        part="disk",
        tried=len(cases),
        survived=len(cases) - len(failures),
        failures=tuple(failures),
        note=f"{len(cases) - commands} in runs, {commands} in commands",
    )


def can_mount() -> bool:
    """Whether this machine lets a process mount a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    program = "mount -t tmpfs none /mnt"
    return (
        subprocess.run(["unshare", "-rm", "sh", "-c", program], capture_output=True).returncode == 0
    )


# From here on: inside the process with its own mounts.


def _fill(disk: Path, *, left: int) -> None:
    """Leaves `left` bytes free."""
    free = shutil.disk_usage(disk).free - left
    if free > 0:
        with open(disk / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free)


def _forbid(disk: Path, *, left: int) -> None:
    """No file can be made, although this is root: without the right to pass over permissions."""
    del left
    for folder in [disk, *(path for path in disk.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    for word in (0, 1):  # effective, permitted: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        data[word] &= ~0b110
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _limit(disk: Path, *, left: int) -> None:
    """No file can become larger than 2 kB, as with `ulimit -f`."""
    del disk, left
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


def _remount(disk: Path, *, left: int) -> None:
    """Only where nothing is open yet."""
    del left
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


KINDS: dict[str, Callable[..., None]] = {"full": _fill, "forbidden": _forbid, "limited": _limit}


def _at(moment: str, act: Callable[[], None]) -> None:
    """Has `act` called at a moment of the run that this process is about to start."""
    module_name, name, call = MOMENTS[moment]
    holder = importlib.import_module(module_name)
    *path, attribute = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, attribute), [0]

    def instead(*arguments, **named):
        calls[0] += 1
        if calls[0] == call:
            act()
        return original(*arguments, **named)

    setattr(holder, attribute, instead)


def _forked(program: Callable[[], int]) -> tuple[int, str]:
    """Runs a program in a fork; returns its exit code and what it wrote to stderr."""
    reader, writer = os.pipe()  # no file, whose size could be limited
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            code = program()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code or 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def _run(job: str, workdir: Path) -> int:
    """`main.py` as the shell starts it."""
    from absl import app

    import main

    sys.argv = ["main.py", f"--config=tests/tasks/tiny.py:{job}", f"--workdir={workdir}", *SETTINGS]
    if job == "pretrain":
        sys.argv.append("--config.run.picture_every=3")
    app.run(main.main, flags_parser=main._parse_flags)
    return 0


def _result(workdir: Path) -> dict:
    """What a run leaves behind, without what differs from run to run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    values = [*lines, json.loads((workdir / "summary.json").read_text())]
    return {
        "values": [
            {name: value for name, value in line.items() if not name.startswith(TIMES)}
            for line in json.loads(json.dumps(values).replace(str(workdir), ""))
        ],
        "files": sorted(
            path.name for path in workdir.iterdir() if path.suffix in (".json", ".png", ".jsonl")
        ),
        "checkpoints": sorted(path.name for path in (workdir / "checkpoints").iterdir()),
    }


# Commands, by the arguments that come before their input and the output's name.
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "export hugging_face": lambda keep, out: _export(keep, out, "hugging_face", "exported"),
    "export timm": lambda keep, out: _export(keep, out, "timm", "exported.safetensors"),
    "import": lambda keep, out: ["import", str(keep / "hf"), "--output", str(out / "imported")],
    "features npz": lambda keep, out: _features(keep, out, "npz"),
    "features parquet": lambda keep, out: _features(keep, out, "parquet"),
    "prepare": lambda keep, out: [
        "prepare",
        f"--source=folder:{keep / 'images'}",
        f"--output={out / 'prepared'}",
        "--shard_images=8",
    ],
}


def _export(keep: Path, out: Path, form: str, name: str) -> list[str]:
    return ["export", str(keep / "run"), "--format", form, "--output", str(out / name)]


def _features(keep: Path, out: Path, suffix: str) -> list[str]:
    output = f"--output={out / 'features'}.{suffix}"
    patches = ["--pool=patches", "--batch-size=4"]
    return ["features", str(keep / "images"), f"--weights={keep / 'run'}", output, *patches]


def _command(arguments: list[str]) -> int:
    from beit_jax import cli

    return cli.main(arguments)


def _content(folder: Path) -> dict[str, int]:
    """Names and sizes of everything below a folder; Orbax' own files differ from time to time."""
    sizes = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not re.search(r"[0-9a-f]{32}", name):
            own = path.name in ("commit_success.txt", "manifest.ocdbt", "_CHECKPOINT_METADATA")
            sizes[name] = 0 if own else path.stat().st_size
    return sizes


@contextlib.contextmanager
def _disk(folder: Path, *, megabytes: int = 16) -> Iterator[Path]:
    """A file system in memory."""
    mounted = folder / "disk"
    mounted.mkdir(exist_ok=True)
    options = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def _repair(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "ballast").unlink(missing_ok=True)
    for folder in [disk, *(path for path in disk.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)


def _check_end(code: int, said: str, *, disk: Path) -> None:
    """The fault ended the program as promised."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    _expect(code == CODE, f"exit code {code}", said)
    _expect(len(errors) == 1, f"{len(errors)} error lines", said)
    _expect(str(disk) in errors[0], "no path", said)
    _expect("the same command" in errors[0], "nothing about how to go on", said)
    _expect("Traceback" not in said, "a traceback", said)


def _expect(condition: bool, otherwise: str, said: str = "") -> None:
    if not condition:
        end = max(said.find("Traceback") - 800, 0) if "Traceback" in said else -1500
        raise AssertionError(f"{otherwise}: {said[end:][:1500]!r}" if said else otherwise)


def _try_run(case: dict, *, reference: dict, folder: Path) -> None:
    with _disk(folder) as disk:
        workdir = disk / "run"

        def with_fault() -> int:
            act = KINDS[case["kind"]]
            _at(case["moment"], lambda: act(disk, left=case["left"]))
            return _run(case["job"], workdir)

        code, said = _forked(with_fault)
        if code != 0:  # 0: what was left sufficed, or the fault came after the last write
            _check_end(code, said, disk=disk)
        checkpoints = workdir / "checkpoints"
        left = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
        _expect(all(name.isdigit() for name in left), f"left in checkpoints: {left}")
        step = re.search(r"the checkpoint at step (\d+) is whole", said)
        _expect(step is None or step[1] in left, "a checkpoint that is not there", said)
        _repair(disk)
        code, said = _forked(lambda: _run(case["job"], workdir))
        _expect(code == 0, f"afterwards exit code {code}", said)
        result = _result(workdir)
        for part, wanted in reference.items():
            other = [one for one in result[part] if one not in wanted]
            missing = [one for one in wanted if one not in result[part]]
            same = result[part] == wanted
            _expect(same, f"afterwards other {part}: {other} instead of {missing}")


def _try_command(case: dict, *, keep: Path, folder: Path) -> None:
    with _disk(folder) as disk:
        arguments = COMMANDS[case["command"]](keep, disk)
        reference = COMMANDS[case["command"]](keep, keep / "reference")
        if not (keep / "reference" / case["command"]).exists():
            code, said = _forked(lambda: _command(reference))
            _expect(code == 0, f"without a fault exit code {code}", said)
        {"full": _fill, "read-only": _remount}[case["kind"]](disk, left=case["left"])
        code, said = _forked(lambda: _command(arguments))
        if code != 0:
            _check_end(code, said, disk=disk)
        left = [path for path in disk.rglob("*") if "tmp" in path.name or path.suffix == ".rows"]
        _expect(not left, f"left behind: {left}")
        _repair(disk)
        code, said = _forked(lambda: _command(arguments))
        _expect(code == 0, f"afterwards exit code {code}", said)
        name = next(iter(disk.iterdir())).name
        found = _content(disk)
        wanted = {k: v for k, v in _content(keep / "reference").items() if k.startswith(name)}
        _expect(found == wanted, f"afterwards other files: {found} instead of {wanted}")


def _prepare_inputs(keep: Path, cases: list[dict]) -> dict[str, dict]:
    """Runs without a fault, and what the commands read; returns the results of the runs by job."""
    keep.mkdir(exist_ok=True)
    (keep / "reference").mkdir(exist_ok=True)
    results = {}
    commands = [case for case in cases if "command" in case]
    jobs = {case["job"] for case in cases if "job" in case} | ({"pretrain"} if commands else set())
    for job in sorted(jobs):
        workdir = keep / ("run" if job == "pretrain" else job)
        code, said = _forked(lambda job=job, workdir=workdir: _run(job, workdir))
        _expect(code == 0, f"without a fault exit code {code}", said)
        results[job] = _result(workdir)
    if commands:
        from PIL import Image

        random = np.random.default_rng(0)
        (keep / "images").mkdir(exist_ok=True)
        for number in range(40):
            pixels = random.integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(keep / "images" / f"{number:02}.png")
        arguments = _export(keep, keep, "hugging_face", "hf")
        code, said = _forked(lambda: _command(arguments))
        _expect(code == 0, f"without a fault exit code {code}", said)
    return results


def _inside(folder: Path, cases: list[dict]) -> list[str]:
    """Tries all; returns a line for each failure."""
    # Before the forks, which then start at once. Nothing here starts a thread.
    import clu.metric_writers
    import tensorflow

    import beit_jax.data.pipeline
    import beit_jax.features.command
    import beit_jax.jobs
    import main  # noqa: F401

    del clu, tensorflow, beit_jax
    results = _prepare_inputs(folder / "keep", cases)
    failures = []
    for case in cases:
        try:
            if "job" in case:
                _try_run(case, reference=results[case["job"]], folder=folder)
            else:
                _try_command(case, keep=folder / "keep", folder=folder)
        except Exception as error:
            failures.append(f"{json.dumps(case)}: {error}"[:2000])
        print(
            f"{json.dumps(case)}: {'failed' if failures else 'well'}", file=sys.stderr, flush=True
        )
    return failures


if __name__ == "__main__":
    print(json.dumps(_inside(Path(sys.argv[1]), json.loads(sys.stdin.read()))))
