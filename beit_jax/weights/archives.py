"""Zip files from elsewhere, within bounds: nothing in one is written anywhere, or much larger.

with_names = open_zip(content).namelist()
"""

import io
import zipfile

_MOST_FILES = 200_000  # a checkpoint has one for each tensor
# Weights hardly get smaller by compression. A megabyte of zeros does, to a thousandth.
_UNPACKED = 10
_UNPACKED_ANYHOW = 64 << 20


def open_zip(content: bytes) -> zipfile.ZipFile:
    """Opens a zip file for reading single entries into memory.

    Raises:
      zipfile.BadZipFile: it is damaged, or what it says it holds is out of all proportion.
    """
    if content.count(b"PK\1\2") > _MOST_FILES:
        raise zipfile.BadZipFile(f"it lists more than {_MOST_FILES} files")
    archive = zipfile.ZipFile(io.BytesIO(content))
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _UNPACKED * len(content) + _UNPACKED_ANYHOW:
        raise zipfile.BadZipFile(f"unpacked it would have {unpacked} bytes")
    return archive
