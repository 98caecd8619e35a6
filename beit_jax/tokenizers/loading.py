"""Opens the tokenizer that a config describes, and reads and writes its weights.

A tokenizer file is a safetensors file (no pickle, no PyTorch): float tensors named after their path
in the parameter tree ("encoder/input/kernel"), and under the metadata key "tokenizer" a JSON object
with the settings they fit and a digest of all of it, since one flipped bit gives other tokens for a
whole run. `kinds.KINDS` says what differs between kinds.

    tokenizer = open_tokenizer(config)
    params = load_params(config)
    ids = jax.jit(tokenizer.encode)(params, images)
"""

import dataclasses
import errno
import hashlib
import json
import os
import struct
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from beit_jax.config import ConfigError, TokenizerConfig, fixed_settings, parse
from beit_jax.config.parse import shown
from beit_jax.files import is_elsewhere, read_regular, to_write, write_whole
from beit_jax.json_text import JsonError, json_object
from beit_jax.models.functional import flatten, unflatten
from beit_jax.tokenizers.kinds import KINDS
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.types import JsonObject, Params, Setting

METADATA_KEY = "tokenizer"
# Among the settings, since safetensors writes several metadata keys in an order that changes from
# one process to the next. Files of older versions lack it.
DIGEST_KEY = "digest"


class TokenizerFileError(ValueError):
    """A tokenizer file is damaged or does not fit the config. The message is one line."""


def open_tokenizer(
    config: TokenizerConfig, *, precision: jax.lax.PrecisionLike = None
) -> Tokenizer:
    """The pure functions of the tokenizer that `config` describes. Reads no file.

    Args:
      config: the tokenizer's settings, of the class that its kind names.
      precision: of the convolutions. None on TPU means one bfloat16 pass, even for float32 inputs.
    """
    return KINDS[config.kind].open(config, precision=precision)


def load_params(config: TokenizerConfig, *, name: str = "config.tokenizer") -> Params:
    """Reads the weights of the tokenizer that `config` describes.

    Args:
      config: `path` is local or `gs://`. With `random_weights`, no file is read and the weights
        are drawn from a fixed key.
      name: the section's full name, for messages.

    Returns:
      A plain nested dict of float32 arrays, as `open_tokenizer(config).init` gives it. What its
      kind calls optional (DALL-E's decoder) may be missing.

    Raises:
      ConfigError: neither `path` nor `random_weights` is set.
      FileNotFoundError: there is no such file; the message says how to get one.
      TokenizerFileError: the file has another hash than `sha256`, is damaged, was made with
        other settings, or its tensors do not fit.
    """
    tokenizer = open_tokenizer(config)
    if config.random_weights:
        logging.warning(
            "%s.random_weights is set: the tokenizer's weights are random and its ids mean "
            "nothing%s. Good for trying the machinery only.",
            name,
            f" ({name}.path {config.path} is not read)" if config.path else "",
        )
        return jax.jit(tokenizer.init)(jax.random.key(0))
    if not config.path:
        raise ConfigError(f"{name}.path: empty; {KINDS[config.kind].how_to_get}")

    content = _read(config, name=name)
    tensors, settings = _parse(content, path=config.path)
    del content
    _check_settings(config, settings, name=name)
    expected = _expected_tensors(config, tensors)
    _check_tensors(tensors, expected, path=config.path)
    return unflatten({key: np.asarray(tensors[key], np.float32) for key in expected})


def save_params(path: str | os.PathLike, params: Params, *, config: TokenizerConfig) -> None:
    """Writes a tokenizer file atomically: readers see the old file or the whole new one.

    Args:
      path: local or `gs://`; the folder is made, an existing file is replaced.
      params: as `open_tokenizer(config).init` gives them; what its kind calls optional
        may be missing.
      config: the settings they fit, written into the file.

    Raises:
      TokenizerFileError: `params` do not fit `config`.
    """
    path = to_write(path)
    tensors = {key: np.asarray(leaf) for key, leaf in flatten(params).items()}
    expected = _expected_tensors(config, tensors)
    _check_tensors(tensors, expected, path=str(path))
    tensors = {key: np.ascontiguousarray(leaf, np.float32) for key, leaf in tensors.items()}
    # image_size is only a record of what the weights were trained on; nothing checks it.
    settings = {key: getattr(config, key) for key in (*fixed_settings(config), "image_size")}
    settings[DIGEST_KEY] = _digest(tensors, settings)
    content = safetensors.numpy.save(tensors, metadata={METADATA_KEY: json.dumps(settings)})
    write_whole(path, content)


def _digest(tensors: Mapping[str, np.ndarray], settings: JsonObject) -> str:
    """SHA-256 of what a file says: its settings, and every tensor's name, type, shape and bytes."""
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        hashed.update(np.ascontiguousarray(tensor).data)
    return hashed.hexdigest()


def _check_settings(config: TokenizerConfig, settings: JsonObject, *, name: str) -> None:
    """Raises one error about every setting that the file was not made with."""
    differing = [key for key in fixed_settings(config) if settings.get(key) != getattr(config, key)]
    if not differing:
        return
    flags = _flags(config, settings, name=name)
    first, *others = differing
    message = (
        f"{name}.{first}: {shown(getattr(config, first))}, but {config.path} was made with"
        f" {shown(settings.get(first))}"
    )
    if flags:
        message += f"; set {' '.join(flags)}"
    elif others:
        message += f"; {', '.join(others)} differ too"
    raise TokenizerFileError(message)


def _flags(config: TokenizerConfig, settings: JsonObject, *, name: str) -> list[str]:
    """Flags that make `config` fit the file, with as many tokens of an image; [] if unknown."""
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in KINDS or not name.startswith("config."):
        return []
    cls = KINDS[kind].config
    try:
        made = parse(cls, {k: v for k, v in settings.items() if k in _defaults(cls)}, path=name)
        # The model wants this number of tokens; a tokenizer takes images of any size.
        made = dataclasses.replace(made, image_size=config.grid * made.stride)
    except ConfigError:
        return []
    if not settings.keys() >= fixed_settings(made).keys():
        return []
    # What only one of the two kinds has must stand at its default for the other (`Choice`).
    now = _defaults(cls) | {key: getattr(config, key) for key in _defaults(type(config))}
    wanted = _defaults(type(config)) | {
        key: getattr(made, key) for key in (*fixed_settings(made), "image_size")
    }
    kept = _defaults(cls).keys() - fixed_settings(made).keys() - {"image_size"}
    return [
        f"--{name}.{key}={value}"
        for key, value in wanted.items()
        if key not in kept and value != now[key] and value is not dataclasses.MISSING
    ]


def _defaults(cls: type[TokenizerConfig]) -> dict[str, Setting]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _expected_tensors(
    config: TokenizerConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes a file must have, without the optional parts of which it has nothing."""
    parts = {key.split("/")[0] for key in tensors}
    absent = set(KINDS[config.kind].optional) - parts
    shapes = flatten(jax.eval_shape(open_tokenizer(config).init, jax.random.key(0)))
    return {key: leaf for key, leaf in shapes.items() if key.split("/")[0] not in absent}


def _read(config: TokenizerConfig, *, name: str) -> bytes:
    """The file's bytes, compared with `config.sha256` if that is set."""
    if is_elsewhere(config.path):
        raise TokenizerFileError(
            f"{name}.path: {config.path} is no path: download it first (only gs:// is read from"
            " afar)"
        )
    path = epath.Path(config.path)
    if not path.exists():
        raise FileNotFoundError(
            f"{name}.path: {config.path} does not exist; {KINDS[config.kind].how_to_get}"
        )
    if path.is_dir():
        raise TokenizerFileError(f"{name}.path: {config.path} is a folder, not a safetensors file")
    try:
        content = read_regular(config.path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.ENXIO):  # else a disk's fault
            raise
        raise TokenizerFileError(
            f"{name}.path: {config.path} can't be read: {error.strerror}"
        ) from None
    if config.sha256:
        found = hashlib.sha256(content).hexdigest()
        if found != config.sha256.lower():
            raise TokenizerFileError(
                f"{name}.sha256: {config.sha256}, but {config.path} has {found}"
            )
    return content


def _parse(content: bytes, *, path: str) -> tuple[dict[str, np.ndarray], JsonObject]:
    """A tokenizer file's tensors by "/"-joined name, and its settings."""
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        hint = (
            "; it starts like a pickle or zip file: convert it first" if _pickled(content) else ""
        )
        raise TokenizerFileError(
            f"{path} ({len(content)} bytes) is not a whole safetensors file:"
            f" {' '.join(str(error).split())[:200]}{hint}"
        ) from None
    # Of bfloat16 and 8-bit floats; of more numbers than there can be.
    except (KeyError, ValueError) as error:
        raise TokenizerFileError(
            f"{path} holds a tensor of a type or shape that is not read: {shown(str(error))}"
        ) from None
    # safetensors.numpy drops the metadata. The file starts with the length of a JSON header, a
    # little-endian uint64; the load above has checked both.
    (length,) = struct.unpack("<Q", content[:8])
    try:
        metadata = json_object(content[8 : 8 + length], path="header").get("__metadata__") or {}
        settings = json_object(metadata.get(METADATA_KEY, ""), path="settings")
    except JsonError:
        raise TokenizerFileError(
            f"{path} is a safetensors file, but not one of a tokenizer: its metadata lacks a JSON "
            f"object {METADATA_KEY!r}; DALL-E's weights are converted with "
            "`python -m beit_jax.weights convert-tokenizer`"
        ) from None
    stated = settings.pop(DIGEST_KEY, None)
    if stated is not None and stated != _digest(tensors, settings):
        raise TokenizerFileError(
            f"{path} is damaged: its numbers or settings are not those that were written; copy it"
            " again"
        )
    named = {key.replace(".", "/"): tensor for key, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise TokenizerFileError(f'{path} holds one tensor under two names, with "." and with "/"')
    return named, settings


def _finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())


def _pickled(content: bytes) -> bool:
    return content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK")


def _check_tensors(
    tensors: dict[str, np.ndarray], expected: dict[str, jax.ShapeDtypeStruct], *, path: str
) -> None:
    """Raises one error that lists every tensor that is missing, unexpected or misshapen."""
    problems = [f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"{key if key.isprintable() and len(key) <= 80 else shown(key)} is unexpected"
        for key in sorted(tensors.keys() - expected.keys())
    ]
    for key in sorted(expected.keys() & tensors.keys()):
        found, wanted = tensors[key], expected[key]
        if found.shape != wanted.shape:
            problems.append(f"{key} is {list(found.shape)} instead of {list(wanted.shape)}")
        elif not np.issubdtype(found.dtype, np.floating):
            problems.append(f"{key} is {found.dtype} instead of a float")
        elif not _finite(found):
            problems.append(f"{key} holds NaN or numbers that are infinite in float32")
    if problems:
        first = "; ".join(problems[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise TokenizerFileError(f"{path} does not fit the tokenizer: {first}{more}")
