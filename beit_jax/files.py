"""Files that are there whole or not at all, and the files under a folder."""

import json
import os
from collections.abc import Iterator

from etils import epath

from beit_jax.types import Json


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file; a reader sees the old content or all of the new, never a part.

    Args:
      path: local or gs://; missing folders are created.
      content: the whole file.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def visible_files(root: str) -> Iterator[str]:
    """All files under a local folder except hidden ones, at any depth, in no particular order.

    Follows links, but visits each folder once: a link to a folder above would never end.

    Yields:
      Paths relative to `root`, with "/" between folders.
    """
    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=True):
        kept = []
        for name in folders:
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        for name in files:
            if not name.startswith("."):
                yield prefix + name


def write_json(path: str | os.PathLike, value: Json) -> None:
    """Writes a value as indented JSON with a final newline, like `write_whole`.

    Args:
      path: local or gs://; missing folders are created.
      value: anything `json.dumps` takes; tuples become lists.
    """
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
