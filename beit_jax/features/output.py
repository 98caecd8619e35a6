"""Files of features, `.npz` and `.parquet`, written row by row and there whole or not at all.

    with open_output("features.npz", shape=(768,), dtype="float32") as output:
        output.add(["a.jpg", "b.jpg"], features)  # [2, 768]
        output.finish({"pool": "cls"})

An `.npz` has `features` [n, *shape], `names` [n] and `metadata`, a JSON string. A Parquet file has
the columns `name` and `features`, a list of each image's numbers in row-major order, and the JSON
as `pyarrow.parquet.read_metadata(path).metadata[b"beit_jax"]`. Rows go to disk as they come: memory
does not grow with their number. Without `finish` nothing is left behind.
"""

import contextlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

from beit_jax import storage
from beit_jax.config import ConfigError, check
from beit_jax.types import JsonObject

METADATA_KEY = b"beit_jax"


class Output(Protocol):
    """A file of features that is being written."""

    def add(self, names: Sequence[str], features: np.ndarray) -> None:
        """Appends rows: `features` is `[len(names), *shape]`."""

    def finish(self, metadata: JsonObject) -> None:
        """Completes the file and moves it to its path, replacing an older one."""

    def close(self) -> None:
        """Removes an unfinished file."""


class NpzOutput:
    """An uncompressed `.npz` file.

    Args:
      path: of the file, which appears in `finish`.
      shape: of one image's features.
      dtype: "float32" or "float16".
    """

    def __init__(self, path: str, *, shape: tuple[int, ...], dtype: str):
        self._path, self._shape, self._dtype = path, shape, np.dtype(dtype)
        self._names: list[str] = []
        # How many rows there will be is known at the end, and stands before them in the file.
        self._rows = open(_temporary(path, "rows"), "w+b")  # noqa: SIM115 closed in `close`

    def add(self, names: Sequence[str], features: np.ndarray) -> None:
        """As `Output.add`."""
        self._names += names
        self._rows.write(np.ascontiguousarray(features, self._dtype).tobytes())

    def finish(self, metadata: JsonObject) -> None:
        """As `Output.finish`."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (len(self._names), *self._shape),
        }
        temporary = _temporary(self._path, "tmp")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("features.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                self._rows.seek(0)
                shutil.copyfileobj(self._rows, file, 1 << 20)
            for name, value in (("names", self._names), ("metadata", json.dumps(metadata))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
        os.replace(temporary, self._path)

    def close(self) -> None:
        """As `Output.close`."""
        with contextlib.suppress(OSError):  # rows that a full disk did not take, and said so
            self._rows.close()
        for kind in ("rows", "tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_temporary(self._path, kind))


class ParquetOutput:
    """A Parquet file, one row group for each call of `add`; the arguments are those of `NpzOutput`.

    Raises:
      ConfigError: pyarrow is not installed.
    """

    def __init__(self, path: str, *, shape: tuple[int, ...], dtype: str):
        pyarrow, self._parquet = _pyarrow()
        self._arrow = pyarrow
        self._path, self._width, self._dtype = path, math.prod(shape), np.dtype(dtype)
        number = pyarrow.float32() if dtype == "float32" else pyarrow.float16()
        self._schema = pyarrow.schema(
            [("name", pyarrow.string()), ("features", pyarrow.list_(number))]
        )
        self._writer = self._parquet.ParquetWriter(_temporary(path, "tmp"), self._schema)

    def add(self, names: Sequence[str], features: np.ndarray) -> None:
        """As `Output.add`."""
        arrow = self._arrow
        values = arrow.array(np.ascontiguousarray(features, self._dtype).ravel())
        starts = arrow.array(np.arange(len(names) + 1, dtype=np.int32) * self._width)
        columns = [arrow.array(names), arrow.ListArray.from_arrays(starts, values)]
        self._writer.write_table(arrow.Table.from_arrays(columns, schema=self._schema))

    def finish(self, metadata: JsonObject) -> None:
        """As `Output.finish`."""
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata).encode()})
        self._writer.close()
        os.replace(_temporary(self._path, "tmp"), self._path)

    def close(self) -> None:
        """As `Output.close`."""
        with contextlib.suppress(OSError):  # as above
            self._writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_temporary(self._path, "tmp"))


FORMATS: Mapping[str, Callable[..., Output]] = {".npz": NpzOutput, ".parquet": ParquetOutput}


def check_output(path: str) -> None:
    """Refuses a path that could not be written at the end of the run.

    Raises:
      ConfigError: an unknown suffix, a folder that does not exist or can't be written to, or a
        package that the format needs is not installed.
      StorageError: the folder's file system is read-only.
    """
    suffix = os.path.splitext(path)[1]
    check(suffix in FORMATS, "--output", f"{path} must end in {' or '.join(FORMATS)}")
    folder = os.path.dirname(path) or "."
    check(os.path.isdir(folder), "--output", f"there is no folder {folder}")
    storage.check_not_read_only(folder)
    check(os.access(folder, os.W_OK), "--output", f"{folder} can't be written to")
    check(not os.path.isdir(path), "--output", f"{path} is a folder")
    if suffix == ".parquet":
        _pyarrow()


@contextlib.contextmanager
def open_output(path: str, *, shape: tuple[int, ...], dtype: str) -> Iterator[Output]:
    """Opens a file of features by its suffix; removes it again unless `finish` was called.

    Args:
      path: ends in `.npz` or `.parquet`.
      shape: of one image's features.
      dtype: "float32" or "float16".

    Raises:
      StorageError: the disk is full or can't be written to; an older file is as it was.
    """
    with storage.writing(path):
        output = FORMATS[os.path.splitext(path)[1]](path, shape=shape, dtype=dtype)
        try:
            yield output
        finally:
            output.close()


def _temporary(path: str, kind: str) -> str:
    return f"{path}.{os.getpid()}.{kind}"


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and its reader and writer of Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "--output: .parquet needs pyarrow, which is not installed:"
            " pip install 'beit-jax[parquet]', or write .npz"
        ) from None
    return pyarrow, pyarrow.parquet
