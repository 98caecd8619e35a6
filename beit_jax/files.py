"""Files that are there whole or not at all."""

import os

from etils import epath


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content`; whoever reads meanwhile sees the old file or the whole new one.

    Args:
      path: local or gs://; folders are made.
      content: all of the file.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
