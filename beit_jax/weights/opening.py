"""Opens foreign files: what import, export, inspect, `init_from` and `load_*` read, they read here.

    opened = open_file("beit_base_patch16_224_pt22k.pth")
    opened.state     # {"cls_token": array, ...}

Which format the keys are in is for `foreign` to find out.
"""

import json

import numpy as np
from etils import epath

from beit_jax.types import JsonObject
from beit_jax.weights import containers, hub
from beit_jax.weights.formats import FORMATS
from beit_jax.weights.formats.format import Opened
from beit_jax.weights.report import WeightsError

# Containers that `containers.load` reads; a format's own are beside them.
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


def is_foreign(path: str) -> bool:
    """Whether `path` looks like a foreign checkpoint, judged without opening a file.

    A file does by its suffix, a folder by its config.json beside weights, "hf:…" always.
    """
    if path.startswith(hub.PREFIX):
        return True
    if path.endswith((*_SUFFIXES, *(row.suffix for row in FORMATS.values() if row.suffix))):
        return True
    folder = epath.Path(path)
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in _FOLDER_FILES
    )


def open_file(path: str, *, sha256: str = "", weights: str = "") -> Opened:
    """Reads the tensors of a file, or of a folder with config.json, whatever they are.

    Args:
      path: a file or folder, local or gs://, or "hf:OWNER/NAME[@REVISION]".
      sha256: what the file must have; "" skips the check.
      weights: which of a training checkpoint's two sets: "ema", "model", or "" for the EMA's where
        there is one, as timm chooses.

    Raises:
      WeightsError: nothing there, damaged, refused, another checksum, or a format that can only be
        written.
    """
    file = epath.Path(hub.resolve(path))
    config: JsonObject = {}
    preprocessor: JsonObject = {}
    if file.is_dir():
        folder = file
        present = [folder / name for name in _FOLDER_FILES if (folder / name).exists()]
        if not present or not (folder / "config.json").exists():
            raise WeightsError(
                f"{path} is no Hugging Face folder: it lacks config.json or model.safetensors"
            )
        file = present[0]
        config = _json(folder / "config.json")
        if (folder / "preprocessor_config.json").exists():
            preprocessor = _json(folder / "preprocessor_config.json")
    source = str(file)
    content = containers.read_bytes(source)
    found = containers.check_sha256(content, sha256, source=source)
    state, metadata = _load(content, source=source)
    return Opened(
        path=source,
        state=state,
        metadata=metadata,
        config=config,
        preprocessor=preprocessor,
        sha256=found,
    )


def _load(content: bytes, *, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """By suffix: a format's own container, or one of those that many formats share."""
    for row in FORMATS.values():
        if not row.suffix or not source.endswith(row.suffix):
            continue
        if row.reader is None:
            raise WeightsError(f"{source}: the format {row.name} can be written, not read")
        if row.reader.load is not None:
            return row.reader.load(content, source)
    return containers.load(content, source=source)


def _json(path: epath.Path) -> JsonObject:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}
