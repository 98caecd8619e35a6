"""Reads foreign checkpoints: recognises the format, then converts strictly.

    checkpoint = read("beit_base_patch16_224_pt22k.pth")
    checkpoint.params        # {"encoder/cls_token": array, ...}, float32
    checkpoint.description   # task, sizes, positions
    print(checkpoint.report)

The formats themselves are in `formats`; nothing here depends on a particular one.
"""

import dataclasses
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from beit_jax.weights import keys, opening
from beit_jax.weights.description import Description
from beit_jax.weights.formats import FORMATS
from beit_jax.weights.formats.format import Format, Opened, Reader
from beit_jax.weights.report import Report, WeightsError, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A foreign checkpoint in this project's tree.

    Attributes:
      params: flat, "encoder/cls_token" → float32 array.
      description: the kind and sizes of the model.
      report: of foreign keys.
      format: its name in `FORMATS`.
      sha256: of the file.
    """

    params: dict[str, np.ndarray]
    description: Description
    report: Report
    format: str
    sha256: str


def read(
    path: str,
    *,
    sha256: str = "",
    normalization: str = "",
    heads: int = 0,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> Checkpoint:
    """Reads a foreign checkpoint, pre-trained or fine-tuned.

    Args:
      path: a Hugging Face folder or a file in a format of `FORMATS`, local or gs://; or a
        repository on the hub, "hf:OWNER/NAME" (`hub.resolve`).
      sha256: what the file must have; "" skips the check.
      normalization: of the pixels, where the format doesn't say; "" then means "half", which the
        published 22k checkpoints were trained with.
      heads: attention heads, where the format doesn't say: files with absolute positions outside
        of Hugging Face; 0 then means width / 64, as in all published models.
      allow_missing: foreign keys that may be missing.
      allow_unused: foreign keys that may be left over.

    Raises:
      WeightsError: damaged, refused, another checksum, not a BEiT, or keys missing or unused.
    """
    opened, found_format = open_foreign(path, sha256=sha256)
    reader = found_format.reader
    assert reader is not None  # `detect` gives only formats that can be read
    description = reader.describe(opened, normalization=normalization, heads=heads)
    params, report = _convert(
        opened,
        description,
        reader=reader,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    return Checkpoint(
        params=params,
        description=description,
        report=report,
        format=found_format.name,
        sha256=opened.sha256,
    )


def _convert(
    opened: Opened,
    description: Description,
    *,
    reader: Reader,
    allow_missing: Iterable[str],
    allow_unused: Iterable[str],
) -> tuple[dict[str, np.ndarray], Report]:
    """Compares every key and shape, then converts. Raises WeightsError."""
    table = reader.table(description)
    shapes = {name: leaf.shape for name, leaf in description.shapes().items()}
    wanted = keys.foreign_shapes(shapes, table)
    rebuilt = [key for key in opened.state if reader.rebuilt(key)]
    found = {key: a.shape for key, a in opened.state.items() if key not in rebuilt}
    missing, unused = check_names(
        wanted,
        found,
        source=opened.path,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        hint=" (allow what is meant by name: --allow-missing, --allow-unused)",
    )
    used = [key for key in wanted if key in found]
    for key in used:
        if not _is_float(opened.state[key]):
            raise WeightsError(f"{opened.path}: {key} is {opened.state[key].dtype}, no float")
    params = keys.to_native(opened.state, table, layers=description.model.layers)
    report = Report(
        used=tuple(used),
        missing=tuple(missing),
        unused=tuple(unused),
        rebuilt=tuple(rebuilt),
        cast=tuple(
            f"{k} ({opened.state[k].dtype})" for k in used if opened.state[k].dtype != np.float32
        ),
    )
    return params, report


def open_foreign(path: str, *, sha256: str = "") -> tuple[Opened, Format]:
    """Opens a foreign file or folder and recognises its format.

    Raises:
      WeightsError: it can't be read, or it is in none of the formats.
    """
    opened = opening.open_file(path, sha256=sha256)
    found = detect(opened)
    if found is None or found.reader is None:
        is_segmentation = "backbone.cls_token" in opened.state
        what = "a segmentation model's" if is_segmentation else "not a BEiT's"
        some = ", ".join(list(opened.state)[:3]) or "none"
        raise WeightsError(f"{path}: the keys are {what} ({some}, ...)")
    state = found.reader.canonical(opened.state)
    return dataclasses.replace(opened, state=state), found


def detect(opened: Opened) -> Format | None:
    """The first format of `FORMATS` that an opened file is in; None where it is in none."""
    for row in FORMATS.values():
        if row.reader is not None and row.reader.detect(opened):
            return row
    return None


def _is_float(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16 or np.issubdtype(array.dtype, np.floating)
