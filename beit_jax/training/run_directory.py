"""A run's directory, checked before anything is written to it.

with opened(workdir):  # can it be one, is no other run in it, are its files whole and ours?
    ...

The rule: a file under one of the names below is replaced only where it is understood as this
program's. A damaged one that can be made again from the run's checkpoints is moved aside, loudly;
anything else is refused by name.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
from absl import logging
from etils import epath

from beit_jax import storage
from beit_jax.config import ConfigError
from beit_jax.config.parse import shown
from beit_jax.distributed import cluster
from beit_jax.files import write_json
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.training import run_lock
from beit_jax.types import JsonObject
from beit_jax.weights import native

FOLDERS = ("checkpoints", "best", "unreadable_checkpoints")
LOGS = ("metrics.jsonl",)
# What `files.write_whole` names a file until it is whole. Not `evaluation.json`, which another
# process may be writing beside the run.
_UNFINISHED = re.compile(
    r"((config|summary|start)\.json|metrics\.jsonl|tokenizer\.safetensors|\w+\.png)\.[0-9]+\.tmp"
)
TOKENIZER = "tokenizer.safetensors"  # a tokenizer's training ends with it
MARKS = ("config.json", "metrics.jsonl", "checkpoints")  # of which a run leaves one at least
EVALUATION = "evaluation.json"
# Keys that a checkpoint's config has besides the settings.
IDENTITY, COUNTS, BEST = "identity", "images", "best"
RECORDED = (IDENTITY, COUNTS, BEST)
# Bytes of a path, and how much of it what is written inside may need: Orbax' temporary names, and
# below them the parameters'.
_LONGEST_PATH, _INSIDE = 4096, 600


def _is_config(value: Mapping[str, object]) -> bool:
    run = value.get("run")
    return isinstance(run, Mapping) and isinstance(run.get("steps"), int)


def _is_summary(value: Mapping[str, object]) -> bool:
    of_run = "steps" in value and ("images_per_second" in value or "time_to_first_step" in value)
    of_probe = "init_from" in value and ("linear" in value or "knn" in value)
    return "seconds" in value and (of_run or of_probe or "classify" in value)


def _is_evaluation(value: Mapping[str, object]) -> bool:
    return "steps" in value and all(isinstance(one, int | float) for one in value.values())


def _is_start(value: Mapping[str, object]) -> bool:
    return isinstance(value.get("versions"), Mapping)


# JSON files, and how this program's own are recognised.
OWN: dict[str, Callable[[Mapping[str, object]], bool]] = {
    "config.json": _is_config,
    "summary.json": _is_summary,
    "start.json": _is_start,
    EVALUATION: _is_evaluation,
}


def check_path(workdir: str) -> None:
    """Checks that a run's directory can be at this path, and writes nothing.

    Args:
      workdir: local or gs://.

    Raises:
      ConfigError: `--workdir: ...` in one line.
      StorageError: the file system is read-only.
    """
    _check_name(workdir)
    if "://" in workdir:
        return
    folder = os.path.abspath(workdir)
    if len(os.fsencode(folder)) + _INSIDE > _LONGEST_PATH:
        raise _refused(workdir, "the path is too long")
    while True:  # upwards, to the nearest folder that exists
        try:
            mode = os.stat(folder).st_mode
        except FileNotFoundError:
            if os.path.islink(folder):
                raise _refused(workdir, f"{_quoted(folder)} is a link to nothing") from None
            folder = os.path.dirname(folder)
            continue
        except NotADirectoryError:
            folder = os.path.dirname(folder)
            continue
        except OSError as error:  # a name that is too long, a link to itself, a locked folder
            raise _refused(workdir, f"{error.strerror}") from None
        break
    here = folder == os.path.abspath(workdir)
    if not stat.S_ISDIR(mode):
        what = "it is" if here else f"{_quoted(folder)} is"
        raise _refused(workdir, f"{what} a file, not a folder")
    storage.check_not_read_only(workdir)
    if not os.access(folder, os.W_OK | os.X_OK):
        what = "it" if here else _quoted(folder)
        raise _refused(workdir, f"{what} may not be written to")


def _check_name(workdir: str) -> None:
    if not workdir.strip():
        raise ConfigError("--workdir: is empty; leave it out for runs/<config name>")
    try:
        workdir.encode()
    except UnicodeEncodeError:
        raise _refused(workdir, "the path is not UTF-8") from None
    if not workdir.isprintable():
        raise _refused(workdir, "the path has characters that can't be printed")
    scheme, found, rest = workdir.partition("://")
    if found and not (scheme == "gs" and re.match(r"[a-z0-9]", rest)):
        raise _refused(workdir, "only local paths and gs://BUCKET/... can hold a run")


def _refused(workdir: str, reason: str) -> ConfigError:
    return ConfigError(f"--workdir: {_quoted(workdir)}: {reason}")


def _quoted(path: str) -> str:
    return path if path.isprintable() and len(path) <= 160 else shown(path)


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[None]:
    """Holds the directory for one run, whose files it has checked; all processes call it.

    Raises:
      ConfigError: it can't be a run's directory, another run is in it, or somebody else's files.
    """
    check_path(workdir)
    with run_lock.hold(workdir):
        check_contents(workdir)
        yield


def check_for_evaluation(workdir: str) -> None:
    """What `opened` checks, for a job that only evaluates and writes nothing but its result.

    Raises:
      ConfigError: as `opened`, but for another run, which may be in the directory.
    """
    check_path(workdir)
    _on_first_process(lambda: _check_files(epath.Path(workdir), (EVALUATION,)))


def check_contents(workdir: str) -> None:
    """Checks the files that a run replaces, and moves damaged ones aside that it makes again.

    To be called while the directory's lock is held, by all processes. `config.json` comes back from
    the newest checkpoint, results when the run ends.

    Args:
      workdir: local or gs://; it may be missing.

    Raises:
      ConfigError: something else is in the place of one of the run's files or folders.
    """
    _on_first_process(lambda: _check_contents(epath.Path(workdir)))


def check_pictures(workdir: str, names: Iterable[str]) -> None:
    """Checks that a run can leave its pictures behind, which it does at its end.

    Args:
      workdir: the run's directory.
      names: of the pictures, without ".png".

    Raises:
      ConfigError: something is in the place of one that is no file.
    """
    root = epath.Path(workdir)

    def check() -> None:
        for name in names:
            check_kind(root / f"{name}.png")

    _on_first_process(check)


def _on_first_process(check: Callable[[], None]) -> None:
    refused = ""
    if jax.process_index() == 0:
        try:
            check()
        except ConfigError as error:
            refused = str(error)
    (refused, *_) = cluster.gather("the run's files", refused)
    if refused:
        raise ConfigError(refused)


def _check_contents(root: epath.Path) -> None:
    for name in FOLDERS:
        if not (root / name).is_dir() and ((root / name).exists() or os.path.islink(root / name)):
            raise _foreign(root / name, "is no folder")
    for folder in (root, root / "best"):
        _check_checkpoints(folder / "checkpoints")
    for name in (*OWN, *LOGS, TOKENIZER):
        check_kind(root / name)
    if (root / TOKENIZER).exists() and not any((root / name).exists() for name in MARKS):
        raise _foreign(root / TOKENIZER, "is in a directory of no run")
    _check_files(root, OWN)
    _remove_unfinished(root)


def _check_files(root: epath.Path, names: Iterable[str]) -> None:
    """Moves damaged ones of these JSON files aside, or refuses them."""
    for name in names:
        check_kind(root / name)
        reason = _damage(root / name, OWN[name])
        if not reason:
            continue
        if not _blank(root / name) and not native.is_checkpoint(str(root)):
            raise _foreign(root / name, reason)
        _move_aside(root / name, reason=reason)
        if name == "config.json":
            _rebuild(root)


def _remove_unfinished(root: epath.Path) -> None:
    """Removes what `files.write_whole` was writing when the run was killed."""
    # Whose config has been understood as a run's; else they may be anybody's.
    for path in root.iterdir() if (root / "config.json").exists() else ():
        whole = _UNFINISHED.fullmatch(path.name)
        if whole and path.is_file():
            logging.info("removed %s, left by a run that was killed", path)
            path.unlink(missing_ok=True)


def check_kind(path: epath.Path) -> None:
    """Raises ConfigError for what is no regular file, or a link to none; it may be missing."""
    if "://" in str(path):
        if path.is_dir():
            raise _foreign(path, "is a folder")
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise _foreign(path, "is a link to nothing") from None
        return
    except OSError as error:
        raise _foreign(path, f"can't be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise _foreign(path, "is a folder")
    if not stat.S_ISREG(mode):
        raise _foreign(path, "is no regular file")


def _damage(path: epath.Path, is_own: Callable[[JsonObject], bool]) -> str:
    """What is wrong with a JSON file of the run; "" where nothing is, or it is missing."""
    if not path.exists():
        return ""
    try:
        value = read_json_object(path, finite=False)
    except JsonError as error:
        return str(error).removeprefix(f"{path} ")
    return "" if is_own(value) else "was written by another program"


def _blank(path: epath.Path) -> bool:
    """Whether there is nothing to lose: power failures leave empty files, or ones of zeros."""
    return path.stat().length < 1 << 20 and not path.read_bytes().strip(b"\0 \t\r\n")


def _move_aside(path: epath.Path, *, reason: str) -> None:
    target = path.parent / f"{path.name}.damaged-{time.time_ns()}"
    path.rename(target)
    logging.error("%s %s: moved to %s, and made again", path, reason, target.name)


def _rebuild(root: epath.Path) -> None:
    """Writes a lost `config.json` again, as the newest checkpoint has it."""
    try:
        config = native.saved_config(str(root))
    except (ConfigError, OSError, ValueError):
        return  # no checkpoint, or it has lost its own as well
    write_json(root / "config.json", plain_config(config))
    logging.error("%s/config.json is made again from the newest checkpoint", root)


def _foreign(path: epath.Path, reason: str) -> ConfigError:
    return ConfigError(
        f"--workdir: {path} {reason}; this run would replace it: move it away, or choose another"
        " --workdir"
    )


def _check_checkpoints(folder: epath.Path) -> None:
    """Refuses folders of somebody else's that look like checkpoints: old ones are deleted."""
    if not folder.exists():
        return
    for entry in folder.iterdir():
        if not entry.name.isdigit():
            continue
        # Orbax takes any digits for a step.
        if not entry.is_dir() or not native.is_step(entry.name):
            raise _foreign(entry, "is not a checkpoint of a run")
        names = {inside.name for inside in entry.iterdir()}
        if names and not names & set(native.CONTENT):
            raise _foreign(entry, "is not a checkpoint of a run")


def plain_config(saved: JsonObject) -> JsonObject:
    """A checkpoint's config without what is recorded beside the settings."""
    return {name: value for name, value in saved.items() if name not in RECORDED}
