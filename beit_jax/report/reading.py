"""Reads what a run has left in its directory: settings, numbers and pictures, whole or not."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from beit_jax import metrics_file
from beit_jax.config import ConfigError
from beit_jax.files import printable, read_regular
from beit_jax.json_text import JsonError, read_json_object
from beit_jax.report import series
from beit_jax.types import Json, JsonObject

METRICS, CONFIG, SUMMARY, START = "metrics.jsonl", "config.json", "summary.json", "start.json"
_LARGEST_NUMBER = 1e100  # of a summary: what is larger was not written by a run
_LARGEST_LOG = 512 << 20  # bytes; a line has about 500, and of 100,000 steps is 50 MB
_LONGEST_NAME = 120  # characters
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PICTURE = 8 << 20  # bytes
_MOST_PICTURES = 12  # of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its directory has it.

    Attributes:
      name: by which the report calls it, another for each run.
      path: local or gs://.
      task: "pretrain", "classify", ...; "" where nothing says it.
      config: the resolved settings; {} where they can't be read.
      summary: what the run wrote at its end; {} before that.
      start: what it wrote before its first step: versions, devices, statistics; {} if nothing.
      lines: of `metrics.jsonl`.
      pictures: the PNG files by name.
      remarks: what could not be read, a line each.
    """

    name: str
    path: str
    task: str
    config: JsonObject
    summary: JsonObject
    start: JsonObject
    lines: Sequence[JsonObject]
    pictures: Mapping[str, bytes]
    remarks: Sequence[str]

    def series(self, metric: str) -> series.Series:
        """The values of a metric; empty where it was not logged."""
        return series.of(self.lines, metric)

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The names of everything that was logged, in the order in which they came."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        return [name for name in names if name != "step"]

    @property
    def step(self) -> int:
        """The last one logged; 0 where none was."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    def setting(self, name: str) -> Json:
        """A setting by its dotted name; None where the run has none such."""
        value: Json = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, name: str) -> float | None:
        """A number of the summary, or of what was known at the start."""
        for source in (self.summary, self.start):
            value = source.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value) if abs(value) < _LARGEST_NUMBER else None
        return None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads runs; of a folder that is none, those directly in it.

    Args:
      paths: of directories, local or gs://.

    Raises:
      ConfigError: there is no such directory, or no run in it.
    """
    found: dict[str, str] = {}
    for path in paths:
        for one in _runs_in(path):
            # A run that is reached through a link, too, is one run.
            real = os.path.realpath(one) if "://" not in one else one.rstrip("/")
            found.setdefault(real, one)
    names = _names(list(found))
    return [_read(path, name=name) for path, name in zip(found, names, strict=True)]


def flat(values: JsonObject, *, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """The leaves of nested objects, by dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _runs_in(path: str) -> list[str]:
    root = epath.Path(path)
    if not path.strip() or not root.is_dir():
        raise ConfigError(f"RUN: there is no directory {printable(path)}")
    if "://" not in path and not os.access(path, os.R_OK | os.X_OK):
        raise ConfigError(f"RUN: {printable(path)} may not be read")
    if any(_is_there(root / name) for name in (METRICS, CONFIG)):
        return [path]
    inside = sorted(root.iterdir(), key=lambda each: each.name)
    runs = [
        os.fspath(each)
        for each in inside
        if each.is_dir() and any((each / name).exists() for name in (METRICS, CONFIG, SUMMARY))
    ]
    if not runs and (root / SUMMARY).exists():
        return [path]
    if not runs:
        raise ConfigError(
            f"RUN: {printable(path)} holds no run: neither {METRICS} nor {CONFIG}, and no folder"
            " directly in it does"
        )
    return runs


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    absolute = [os.path.abspath(path) if "://" not in path else path for path in paths]
    parts = [path.rstrip("/").split("/") for path in absolute]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [shown(name) for name in names]


def _read(path: str, *, name: str) -> Run:
    root = epath.Path(path)
    remarks: list[str] = []
    objects = {file: _object(root / file, remarks) for file in (CONFIG, SUMMARY, START)}
    lines = _lines(root / METRICS, remarks)
    task = objects[CONFIG].get("task", "")
    if not task and ("knn" in objects[SUMMARY] or "linear" in objects[SUMMARY]):
        task = "probe"
    return Run(
        name=name,
        path=printable(path),
        task=task if isinstance(task, str) else "",
        config=objects[CONFIG],
        summary=objects[SUMMARY],
        start=objects[START],
        lines=lines,
        pictures=_pictures(root, remarks),
        remarks=remarks,
    )


def _is_there(path: epath.Path) -> bool:
    """Whether there is something, a link that leads nowhere among it."""
    return os.path.lexists(path) if "://" not in os.fspath(path) else path.exists()


def _lines(path: epath.Path, remarks: list[str]) -> list[JsonObject]:
    if not _is_there(path):
        return []
    try:
        lines, foreign = metrics_file.parsed(read_regular(os.fspath(path), largest=_LARGEST_LOG))
    except OSError as error:
        remarks.append(f"{METRICS} can't be read: {error.strerror or error}")
        return []
    if foreign:
        remarks.append(
            f"{len(foreign)} lines of {METRICS} are no metrics and are left out, the first is line"
            f" {foreign[0]}"
        )
    return [{shown(name): value for name, value in line.items()} for line in lines]


def shown(name: str) -> str:
    """A name as the page has it: printable, not empty, and no longer than a line."""
    plain = printable(name) or '""'
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[: _LONGEST_NAME - 1]}…"


def _object(path: epath.Path, remarks: list[str]) -> JsonObject:
    if not _is_there(path):
        return {}
    try:
        return read_json_object(path, finite=False)
    except JsonError as error:
        remarks.append(str(error))
        return {}


def _pictures(root: epath.Path, remarks: list[str]) -> dict[str, bytes]:
    paths = sorted(path for path in root.iterdir() if path.name.endswith(".png"))
    if len(paths) > _MOST_PICTURES:
        remarks.append(f"{len(paths) - _MOST_PICTURES} more PNG files are not shown")
    pictures = {}
    for path in paths[:_MOST_PICTURES]:
        try:
            content = read_regular(os.fspath(path), largest=_LARGEST_PICTURE)
        except OSError as error:
            remarks.append(f"{shown(path.name)} can't be read: {error.strerror or error}")
            continue
        if content.startswith(_PNG):
            pictures[shown(path.name)] = content
        else:
            remarks.append(f"{shown(path.name)} is no PNG")
    return pictures
