"""Reads foreign checkpoints: recognises the format, then converts strictly.

    checkpoint = read("beit_base_patch16_224_pt22k.pth")
    checkpoint.params        # {"encoder/cls_token": array, ...}, float32
    checkpoint.description   # task, sizes, positions
    print(checkpoint.report)

The formats themselves are in `formats`; nothing here depends on a particular one.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import ml_dtypes
import numpy as np

from beit_jax.config import ConfigError
from beit_jax.models.relative_positions import relative_position_index
from beit_jax.types import JsonObject
from beit_jax.weights import keys, opening
from beit_jax.weights.description import Description
from beit_jax.weights.formats import FORMATS
from beit_jax.weights.formats.format import (
    NOTHING_STATED,
    Described,
    Format,
    Opened,
    Reader,
    State,
    Stated,
)
from beit_jax.weights.report import Report, WeightsError, allowed, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A foreign checkpoint in this project's tree.

    Attributes:
      params: flat, "encoder/cls_token" → float32 array; the variables of a model that has some are
        among them (`Description.split`).
      description: the kind and sizes of the model.
      report: of foreign keys.
      guessed: facts that the file does not say → what was taken for them and why.
      kept: what the file says that no parameter shows, for exports.
      format: its name in `FORMATS`.
      sha256: of the file.
    """

    params: dict[str, np.ndarray]
    description: Description
    report: Report
    guessed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: JsonObject = dataclasses.field(default_factory=dict)
    format: str
    sha256: str


def read(
    path: str,
    *,
    sha256: str = "",
    stated: Stated = NOTHING_STATED,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> Checkpoint:
    """Reads a foreign checkpoint, pre-trained or fine-tuned.

    Args:
      path: a Hugging Face folder or a file in a format of `FORMATS`, local or gs://; or a
        repository on the hub, "hf:OWNER/NAME" (`hub.resolve`).
      sha256: what the file must have; "" skips the check.
      stated: facts that the file may not say.
      allow_missing: foreign keys that may be missing; none of the encoder's.
      allow_unused: foreign keys that may be left over, and are not converted; none of the
        encoder's.

    Raises:
      WeightsError: damaged, refused, another checksum, not a BEiT, keys missing or unused, or
        numbers that are not finite.
    """
    opened, found_format = open_foreign(path, sha256=sha256, weights=stated.weights)
    reader = found_format.reader
    assert reader is not None  # `detect` gives only formats that can be read
    described = reader.describe(opened, stated=stated)
    heads = described.description.model.heads
    if stated.heads and heads != stated.heads:
        raise WeightsError(f"heads: {stated.heads}, but {path} says {heads}")
    params, report = _convert(
        opened,
        described,
        reader=reader,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    return Checkpoint(
        params=params,
        description=described.description,
        report=report,
        guessed=described.guessed,
        kept=described.kept,
        format=found_format.name,
        sha256=opened.sha256,
    )


def _convert(
    opened: Opened,
    described: Described,
    *,
    reader: Reader,
    allow_missing: Iterable[str],
    allow_unused: Iterable[str],
) -> tuple[dict[str, np.ndarray], Report]:
    """Compares every key and shape, then converts. Raises WeightsError."""
    description = described.description
    table = reader.table(description)
    try:
        shapes = {name: leaf.shape for name, leaf in description.shapes().items()}
    except ConfigError as error:  # of a head that does not fit the encoder
        raise WeightsError(f"{opened.path}: {error}") from None
    wanted = keys.foreign_shapes(shapes, table)
    rebuilt = [key for key in opened.state if reader.rebuilt(key)]
    left_out = [
        key for key in opened.state if key not in wanted and allowed(key, described.left_out)
    ]
    set_aside = {*rebuilt, *left_out}
    missing, unused = check_names(
        wanted,
        {key: array.shape for key, array in opened.state.items() if key not in set_aside},
        source=opened.path,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        fixed=reader.in_encoder,
        hint=" (import and export allow what is left over by name, --allow-unused; import alone"
        " also what is missing, --allow-missing, for a warm start that draws it anew)",
    )
    used = {key: opened.state[key] for key in wanted if key in opened.state}
    counts = {row.foreign for row in table if row.transform.counts}
    variances = {row.foreign for row in table if row.transform.variances}
    _check_numbers(used, counts=counts, variances=variances, source=opened.path)
    _check_index(opened, rebuilt, grid=description.model.grid)
    params = keys.to_native(used, table, layers=description.model.layers)
    report = Report(
        used=tuple(used),
        missing=tuple(missing),
        unused=tuple(unused),
        left_out=tuple(left_out),
        rebuilt=tuple(rebuilt),
        cast=tuple(
            f"{key} ({array.dtype})"
            for key, array in used.items()
            if array.dtype != np.float32 and key not in counts
        ),
        guessed=tuple(f"{name} {text}" for name, text in described.guessed.items()),
        notes=(*opened.notes, *described.notes),
    )
    return params, report


def _check_index(opened: Opened, rebuilt: Iterable[str], *, grid: int) -> None:
    """Raises WeightsError for an index buffer that is not this project's for the grid.

    The buffers are computed anew, which is the same function only where they are the same ones: a
    model of images that are not square may have a table that fits a square.
    """
    expected = None
    for key in rebuilt:
        if expected is None:
            expected = relative_position_index(grid)
        if not np.array_equal(opened.state[key], expected):
            raise WeightsError(
                f"{opened.path}: {key} is not the index of {grid} × {grid} patches, row by row; it"
                " is of images that are not square, or counts the patches otherwise"
            )


def _check_numbers(
    state: State, *, counts: Collection[str], variances: Collection[str], source: str
) -> None:
    """Raises WeightsError for tensors of whole numbers, NaN or infinities, and impossible values.

    Args:
      state: foreign key → array.
      counts: keys of numbers of batches.
      variances: keys of variances: the root of one below 0 is NaN.
      source: for messages.
    """
    for key, array in state.items():
        if key in counts:
            is_whole = np.issubdtype(array.dtype, np.integer)
            if not is_whole or not 0 <= int(array) <= keys.LARGEST_COUNT:
                raise WeightsError(
                    f"{source}: {key} is {array.dtype} {array}, no count up to {keys.LARGEST_COUNT}"
                )
            continue
        if not _is_float(array):
            raise WeightsError(f"{source}: {key} is {array.dtype}, no float")
        finite = np.isfinite(array)
        if not finite.all():
            count = int(array.size - finite.sum())
            raise WeightsError(f"{source}: {key} holds {count} numbers that are NaN or infinite")
        if key in variances and array.size and array.min() < 0:
            raise WeightsError(f"{source}: {key} holds {array.min():g}, and no variance is below 0")


def open_foreign(path: str, *, sha256: str = "", weights: str = "") -> tuple[Opened, Format]:
    """Opens a foreign file or folder and recognises its format.

    Raises:
      WeightsError: it can't be read, or it is in none of the formats.
    """
    opened = opening.open_file(path, sha256=sha256, weights=weights)
    found = detect(opened)
    if found is None or found.reader is None:
        some = ", ".join(list(opened.state)[:3]) or "none"
        raise WeightsError(f"{path}: the keys are {_whose(opened.state)} ({some}, ...)")
    state = found.reader.canonical(opened.state)
    return dataclasses.replace(opened, state=state), found


def _whose(state: State) -> str:
    """What is known of keys that are in no format."""
    modules = {key.split(".")[0] for key in state}
    if modules & {"decode_head", "auxiliary_head"}:
        return "a segmentation model's, but neither the official one's nor transformers'"
    if "backbone.cls_token" in state:
        return "OpenMMLab's (mmpretrain), which are not read"
    return "not a BEiT's"


def detect(opened: Opened) -> Format | None:
    """The first format of `FORMATS` that an opened file is in; None where it is in none."""
    for row in FORMATS.values():
        if row.reader is not None and row.reader.detect(opened):
            return row
    return None


def _is_float(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16 or np.issubdtype(array.dtype, np.floating)
