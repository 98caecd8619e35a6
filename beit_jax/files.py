"""Files that are there whole or not at all, and the files under a folder."""

import contextlib
import errno
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader

from etils import epath

from beit_jax import storage
from beit_jax.config.parse import ConfigError, shown
from beit_jax.types import Json


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file; a reader sees the old content or all of the new, never a part.

    Args:
      path: local or gs://; missing folders are created.
      content: the whole file.

    Raises:
      ConfigError: the path is an address that nothing here writes to, such as "https://...".
      StorageError: the disk is full or can't be written to; an old file is as it was.
    """
    target = to_write(path)
    with storage.writing(path, needed=len(content)):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_together(
    folder: str | os.PathLike, contents: Mapping[str, bytes], *, needed_by_all: str
) -> None:
    """Writes files that mean nothing without each other.

    A process that is killed on the way leaves the old files, the new ones, or a folder without the
    file that its readers need; never new and old ones that are taken for one whole.

    Args:
      folder: local or gs://; made where it is missing.
      contents: by the files' names.
      needed_by_all: the one of them without which no reader takes the others.

    Raises:
      ConfigError: the path is an address that nothing here writes to, such as "https://...".
      StorageError: the disk is full or can't be written to; old files are as they were.
    """
    target = to_write(folder)
    names = [*(name for name in contents if name != needed_by_all), needed_by_all]
    temporary = {name: target / f"{name}.{os.getpid()}.tmp" for name in names}
    with storage.writing(folder, needed=sum(map(len, contents.values()))):
        target.mkdir(parents=True, exist_ok=True)
        try:
            for name in names:
                temporary[name].write_bytes(contents[name])
            (target / needed_by_all).unlink(missing_ok=True)
            for name in names:
                temporary[name].replace(target / name)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)


def to_write(path: str | os.PathLike) -> epath.Path:
    """The place to write to; raises ConfigError for one that nothing here writes to."""
    name = os.fspath(path)
    if is_elsewhere(name):
        raise ConfigError(f"{shown(name)}: only local paths and gs:// are written to")
    return epath.Path(path)


def visible_files(
    root: str, *, skipped: Callable[[str, str], None] = lambda path, reason: None
) -> Iterator[str]:
    """All regular files under a local folder except hidden ones, at any depth, in no order.

    Follows links, but visits each folder once: a link to a folder above would never end. What is no
    regular file (a pipe, a socket, a device, a link to one or to nothing) is skipped, since opening
    a pipe waits for a writer and `/dev/zero` has no end.

    Args:
      root: the folder.
      skipped: called with a path and why it is left out, for each such entry and for each folder
        that can't be listed.

    Yields:
      Paths relative to `root`, with "/" between folders.
    """
    seen = {os.path.realpath(root)}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            # Unlike os.walk, scandir keeps the kinds of entries, so that only links need a stat.
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    kind = _kind(entry)
                    if kind == "folder":
                        real = os.path.realpath(entry.path)
                        if real not in seen:
                            seen.add(real)
                            waiting.append(f"{prefix}{entry.name}/")
                    elif kind == "file":
                        yield prefix + entry.name
                    else:
                        skipped(prefix + entry.name, kind)
        except OSError as error:
            skipped(prefix, error.strerror or type(error).__name__)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file", or why the entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "not a regular file"
    except OSError as error:  # a link to itself, a folder above that may not be entered
        return error.strerror or type(error).__name__


def printable(name: str) -> str:
    """A file's name for messages, on one line, whoever named the file.

    A name may hold line breaks, which would forge a line of the log, codes that move a terminal's
    cursor, and bytes that are not UTF-8: all of them become escapes such as "\\n" and "\\xe9".
    """
    with contextlib.suppress(UnicodeEncodeError):  # a surrogate that stands for no byte
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in name
    )


def open_regular(path: str) -> BufferedReader:
    """Opens a local file for reading bytes, without ever waiting.

    Raises:
      OSError: it can't be opened, or is no regular file. (Opening a pipe waits for a writer, and
        `/dev/zero` has no end.)
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return os.fdopen(descriptor, "rb")


def read_regular(path: str, *, largest: int | None = None) -> bytes:
    """A file's bytes, local or gs://; never waits, and never fills the memory.

    Args:
      path: of the file.
      largest: bytes that it may have; None: as many as the machine has memory.

    Raises:
      OSError: it can't be opened or read, is no regular file, is larger, or does not fit in memory.
    """
    remote = "://" in path
    with epath.Path(path).open("rb") if remote else open_regular(path) as file:
        size = epath.Path(path).stat().length if remote else os.fstat(file.fileno()).st_size
        if largest is not None and size > largest:
            raise OSError(errno.EFBIG, f"larger than {largest >> 20} MiB", path)
        if size > _memory():
            raise OSError(errno.ENOMEM, f"{size} bytes, more than this machine has memory", path)
        try:
            return file.read()
        except MemoryError:
            raise OSError(errno.ENOMEM, f"{size} bytes do not fit in memory", path) from None


def _memory() -> int:
    """Bytes of memory that this machine has; beyond any file where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def is_elsewhere(path: str) -> bool:
    """Whether a path names a place that nothing here reads: "https://...", "s3://..."."""
    return re.match(r"\w+://", path) is not None and not path.startswith("gs://")


def write_json(path: str | os.PathLike, value: Json) -> None:
    """Writes a value as indented JSON with a final newline, like `write_whole`.

    Args:
      path: local or gs://; missing folders are created.
      value: anything `json.dumps` takes; tuples become lists.
    """
    write_whole(path, json_bytes(value))


def json_bytes(value: Json) -> bytes:
    """A value as indented JSON with a final newline; takes anything that `json.dumps` takes."""
    return (json.dumps(value, indent=2) + "\n").encode()
