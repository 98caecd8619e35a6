"""Reads JSON that something else wrote: another program, another version, or somebody hostile.

    config = read_json_object("config.json")
    header = json_object(content, path="model.safetensors: the header")

`json.loads` ends with a RecursionError for nested lists, takes the last of two equal keys, reads
NaN and 1e999, and gives what is no object to code that asks for keys. Everything that was not
written by this process is read here instead, and is either an object or one line that names it.
"""

import collections
import json
import math
import os
import re

from etils import epath

from beit_jax.config.parse import ConfigError, shown
from beit_jax.files import open_regular
from beit_jax.types import Json, JsonObject

LARGEST = 16 << 20  # bytes; the config of a model with 20,000 classes has 1 MB
_DEEPEST = 64  # lists and objects within each other; configs have five
# Lists, objects, and what is in them: 2 bytes of JSON can be 64 bytes of Python.
_MOST_VALUES = 2_000_000
_DIGITS = 40  # of a whole number; those of 64 bits have 20
# A string, as far as it goes, or a bracket. It matches at every quote, so that the time to look for
# all of them grows no faster than the text.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ConfigError):
    """A text is no JSON, or no object. The message is one line that starts with its path."""


def read_json_object(
    path: str | os.PathLike, *, largest: int = LARGEST, finite: bool = True
) -> JsonObject:
    """Reads the JSON object of a file.

    Args:
      path: local or gs://. A local file must be a regular one, since a pipe never ends.
      largest: bytes that the file may have.
      finite: as for `json_object`.

    Raises:
      JsonError: as `json_object`, or the file can't be read.
    """
    return json_object(_content(path, largest=largest), path=path, largest=largest, finite=finite)


def json_object(
    text: str | bytes, *, path: object, largest: int = LARGEST, finite: bool = True
) -> JsonObject:
    """The JSON object of a text.

    Args:
      text: JSON, in UTF-8 where it is bytes.
      path: where it is from, which starts every message.
      largest: bytes that the text may have.
      finite: whether NaN, infinities and numbers beyond float64 are errors. This project's own logs
        may hold them; in JSON they are not known.

    Raises:
      JsonError: no JSON, no object, too large, nested too deep, or one key twice in an object.
    """
    value = json_value(text, path=path, largest=largest, finite=finite)
    if not isinstance(value, dict):
        raise JsonError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def json_value(
    text: str | bytes, *, path: object, largest: int = LARGEST, finite: bool = True
) -> Json:
    """Whatever JSON a text is; otherwise like `json_object`."""
    if len(text) > largest:
        raise JsonError(f"{path} is larger than the {largest} bytes that are read of JSON")
    if not text:
        raise JsonError(f"{path} is no JSON: it is empty")
    try:
        decoded = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise JsonError(f"{path} is no JSON: byte {error.start} is not UTF-8") from None
    if sum(map(decoded.count, ",[{")) > _MOST_VALUES:
        raise JsonError(f"{path} holds more values than the {_MOST_VALUES} that are read of JSON")
    if _depth(decoded) > _DEEPEST:
        raise JsonError(f"{path} is no JSON that can be read: it is nested too deep")
    try:
        return json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_finite if finite else None,
        )
    except ValueError as error:  # a JSONDecodeError, or from the functions below
        raise JsonError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}") from None


def _content(path: str | os.PathLike, *, largest: int) -> bytes:
    file = epath.Path(path)
    try:
        if "://" in str(path):
            if file.stat().length > largest:
                raise JsonError(f"{path} is larger than the {largest} bytes that are read of JSON")
            return file.read_bytes()
        with open_regular(os.fspath(path)) as local:
            return local.read(largest + 1)
    except OSError as error:
        raise JsonError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # NUL in a path
        if isinstance(error, JsonError):
            raise
        raise JsonError(f"{shown(str(path))} can't be read: {error}") from None


def _depth(text: str) -> int:
    """How many lists and objects are within each other, brackets in strings left aside."""
    deepest = depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} is there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no number that JSON or float64 knows")
    return value
