"""Opens foreign files: what import, export, inspect, `init_from` and `load_*` read, they read here.

    opened = open_file("beit_base_patch16_224_pt22k.pth")
    opened.state     # {"cls_token": array, ...}

Which format the keys are in is for `foreign` to find out.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from beit_jax.files import is_elsewhere
from beit_jax.types import JsonObject
from beit_jax.weights import containers, folders, hub, native, shards, unwrapping
from beit_jax.weights.formats import FORMATS
from beit_jax.weights.formats.format import Opened
from beit_jax.weights.report import WeightsError

_CONFIGS = ("config.json", "preprocessor_config.json")


def is_foreign(path: str) -> bool:
    """Whether `path` is a foreign checkpoint, judged without opening a file.

    Every file is one, since this project's checkpoints are folders, and so is what is not there but
    has the suffix of one; a folder is one by the names of the files in it, "hf:…" always.
    """
    if path.startswith(hub.PREFIXES) or is_elsewhere(path):
        return True
    formats = (row.suffix for row in FORMATS.values() if row.suffix)
    if path.endswith((*containers.SUFFIXES, *formats)):
        return True
    place = epath.Path(path)
    if place.is_dir():
        return folders.has_weights(place)
    return place.exists()


def open_file(path: str, *, sha256: str = "", weights: str = "") -> Opened:
    """Reads the tensors of a file, or of a folder, whatever they are.

    Args:
      path: a file in a container of `containers` or of a format; an index of shards; a folder that
        holds one or the other, Hugging Face's or DeepSpeed's; local or gs://, or
        "hf:OWNER/NAME[@REVISION]". `model.safetensors` means the same as its folder.
      sha256: what the file must have; "" skips the check. For shards, see
        `containers.combined_sha256`.
      weights: which of a training checkpoint's two sets: "ema", "model", or "" for the EMA's where
        there is one, as timm chooses.

    Raises:
      WeightsError: nothing there, damaged, refused, another checksum, several files or sets of
        weights that could be meant, or a format that can only be written.
    """
    unwrapping.check_choice(weights)
    file = _place(hub.resolve(path))
    choice = folders.Choice(file="")
    configs: list[JsonObject] = [{}, {}]
    if file.is_dir():
        if native.is_checkpoint(path):
            raise WeightsError(f"{path} is a checkpoint of this project; use it as it is")
        folder = file
        choice = folders.find(folder, source=path)
        file = folder / choice.file
        configs = [_config(folder / name) for name in _CONFIGS]
    elif folders.is_named(file.name):  # the same as to give its folder
        configs = [_config(file.parent / name) for name in _CONFIGS]
    elif folders.is_shard(file.name) and file.exists():
        raise WeightsError(f"{file} is one of several files of weights; give their folder")
    found = _read(file, sha256=sha256, weights=weights)
    own_note = ""
    if configs[0] and _is_nobodys(configs[0], found.state):
        configs[0] = {}
        own_note = "left aside: config.json, which is neither transformers' nor timm's"
    is_half = any(array.dtype.itemsize == 2 for array in found.state.values())
    notes = (choice.note, choice.half_note if is_half else "", own_note, *found.notes)
    return Opened(
        path=found.source,
        state=found.state,
        metadata=found.metadata,
        config=configs[0],
        preprocessor=configs[1],
        sha256=found.sha256,
        notes=tuple(note for note in notes if note),
        extras=found.extras,
    )


def _is_nobodys(config: JsonObject, state: Mapping[str, np.ndarray]) -> bool:
    """Whether a config beside official names says no model, as `PyTorchModelHubMixin`'s does."""
    names = (config.get(key) for key in ("model_type", "architecture"))
    is_named = any(isinstance(name, str) for name in names)
    # A damaged one of theirs is not nobody's.
    is_named |= not config.keys().isdisjoint(("architectures", "model_args", "pretrained_cfg"))
    return not is_named and any(key.startswith("blocks.0.") for key in state)


def _place(path: str) -> epath.Path:
    """A path that can be looked at. Raises WeightsError for what can only be downloaded."""
    repository = re.match(
        r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path
    )
    repository = repository or re.match(r"hf://([\w.-]+/[\w.-]+)", path)
    if repository:
        raise WeightsError(f"{path}: a repository of the hub is written hf:{repository[1]}")
    if path.startswith("file://"):
        raise WeightsError(f"{path}: give the path alone, {path.removeprefix('file://')}")
    if is_elsewhere(path):
        raise WeightsError(f"{path} is no path: download it first (only gs:// is read from afar)")
    file = epath.Path(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not file.exists():
        raise WeightsError(f"{path} does not exist; a repository of the hub is written hf:{path}")
    return file


def _config(path: epath.Path) -> JsonObject:
    return shards.read_json(path) if path.exists() else {}


def _read(file: epath.Path, *, sha256: str, weights: str) -> containers.Loaded:
    """A file's tensors: an index's, a format's own container's, or one that many formats share."""
    source = str(file)
    if folders.is_index(file.name):
        unwrapping.refuse_average(weights, source=source)
        loaded = shards.load(file.parent, file.name)
        containers.check_digest(loaded.sha256, sha256, source=source)
        return loaded
    content = containers.read_bytes(source)
    digest = containers.check_sha256(content, sha256, source=source)
    for row in FORMATS.values():
        if not row.suffix or not source.endswith(row.suffix):
            continue
        if row.reader is None:
            raise WeightsError(f"{source}: the format {row.name} can be written, not read")
        if row.reader.load is not None:
            unwrapping.refuse_average(weights, source=source)
            state, metadata = row.reader.load(content, source)
            return containers.Loaded(source=source, state=state, metadata=metadata, sha256=digest)
    loaded = containers.load(content, source=source, weights=weights)
    return dataclasses.replace(loaded, sha256=digest)
