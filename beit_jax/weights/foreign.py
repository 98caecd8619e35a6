"""Reads foreign checkpoints: recognises the format, then one strict conversion into our tree.

checkpoint = read("beit_base_patch16_224_pt22k.pth")
checkpoint.params        # {"encoder/cls_token": array, ...}, float32
checkpoint.description   # task, sizes, positions
print(checkpoint.report)
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from beit_jax.config import ModelConfig
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.weights import hub, keys, pickles
from beit_jax.weights.description import Description
from beit_jax.weights.formats import hugging_face, unilm
from beit_jax.weights.report import Report, WeightsError, check_names

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# What a `.pth` may keep its state dict under: official, DeepSpeed, OpenMMLab.
_WRAPPERS = ("model", "module", "state_dict")
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A foreign file as it is, before any conversion.

    Attributes:
      format: "hugging_face", "unilm" or "timm".
      state: foreign key → array.
      config: `config.json`, where there is one.
      preprocessor: `preprocessor_config.json`, where there is one.
      sha256: of the file with the weights.
      path: that file.
    """

    format: str
    state: dict[str, np.ndarray]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    sha256: str
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A foreign checkpoint in our tree.

    Attributes:
      params: flat, "encoder/cls_token" → float32 array.
      description: what it is.
      report: of foreign keys.
      format: as in `Source`.
      sha256: of the file.
    """

    params: dict[str, np.ndarray]
    description: Description
    report: Report
    format: str
    sha256: str


def is_foreign(path: str) -> bool:
    """Whether `path` looks like a foreign checkpoint: a file's suffix, a folder's config.json."""
    if path.endswith(SUFFIXES) or path.startswith(hub.PREFIX):
        return True
    folder = epath.Path(path)
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin")
    )


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
      path: a Hugging Face folder, or a file of any of the three formats; local or gs://; or a
        repository on the hub, "hf:OWNER/NAME".
      sha256: what the file must have; "": not checked.
      normalization: of the pixels, where the format doesn't say; "" then means "half", which the
        published 22k checkpoints were trained with.
      heads: attention heads, where the format doesn't say: files with absolute positions outside
        of Hugging Face; 0 then means width / 64, as all published models.
      allow_missing: foreign keys that may be missing.
      allow_unused: foreign keys that may be left over.

    Raises:
      WeightsError: damaged, refused, another checksum, no BEiT, or keys missing or unused.
    """
    source = read_source(path, sha256=sha256)
    description = describe_source(source, normalization=normalization, heads=heads)
    table = table_of(source.format, description)
    shapes = {name: leaf.shape for name, leaf in description.shapes().items()}
    wanted = keys.foreign_shapes(shapes, table)
    rebuilt = [key for key in source.state if key.split(".")[-1] == unilm.INDEX]
    found = {key: a.shape for key, a in source.state.items() if key not in rebuilt}
    missing, unused = check_names(
        wanted,
        found,
        source=source.path,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        hint=" (allow what is meant by name: --allow-missing, --allow-unused)",
    )
    used = [key for key in wanted if key in found]
    for key in used:
        if not _is_float(source.state[key]):
            raise WeightsError(f"{source.path}: {key} is {source.state[key].dtype}, no float")
    params = keys.to_ours(source.state, table, layers=description.model.layers)
    report = Report(
        used=tuple(used),
        missing=tuple(missing),
        unused=tuple(unused),
        rebuilt=tuple(rebuilt),
        cast=tuple(
            f"{k} ({source.state[k].dtype})" for k in used if source.state[k].dtype != np.float32
        ),
    )
    return Checkpoint(
        params=params,
        description=description,
        report=report,
        format=source.format,
        sha256=source.sha256,
    )


def table_of(format: str, description: Description) -> keys.Table:
    """The key table of a format."""
    if format == "hugging_face":
        return hugging_face.TABLES[description.task]
    return unilm.TABLE


def read_source(path: str, *, sha256: str = "") -> Source:
    """Opens a foreign file or folder; raises WeightsError where that fails."""
    folder = epath.Path(hub.resolve(path))
    config, preprocessor, file = {}, {}, folder
    if folder.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        present = [folder / name for name in names if (folder / name).exists()]
        if not present or not (folder / "config.json").exists():
            raise WeightsError(
                f"{path} is no Hugging Face folder: it lacks config.json or model.safetensors"
            )
        file = present[0]
        config = _json(folder / "config.json")
        if (folder / "preprocessor_config.json").exists():
            preprocessor = _json(folder / "preprocessor_config.json")
    content = pickles.read_bytes(str(file))
    found = check_sha256(content, sha256, source=str(file))
    if file.name.endswith(".safetensors"):
        state, metadata = load_safetensors(content, source=str(file))
        guess = "timm"
        if "timm" in metadata:
            config = config or json.loads(metadata["timm"])["arguments"]
        if metadata.get("normalization"):
            preprocessor = preprocessor or {"normalization": metadata["normalization"]}
    else:
        state = state_dict(pickles.loads(content, source=str(file)), source=str(file))
        guess = "unilm"
    state = hugging_face.canonical(state)
    if any(key.startswith("beit.") for key in state):
        guess = "hugging_face"
        if not config:
            raise WeightsError(
                f"{path} has Hugging Face's keys; give the folder that also has config.json"
            )
    elif "cls_token" not in state or "blocks.0.attn.qkv.weight" not in state:
        what = "a segmentation model's" if "backbone.cls_token" in state else "no BEiT's"
        some = ", ".join(list(state)[:3]) or "none"
        raise WeightsError(f"{path}: the keys are {what} ({some}, ...)")
    return Source(
        format=guess,
        state=state,
        config=config,
        preprocessor=preprocessor,
        sha256=found,
        path=str(file),
    )


def describe_source(source: Source, *, normalization: str = "", heads: int = 0) -> Description:
    """What a foreign checkpoint is, by its config or, without one, by its shapes."""
    if source.format == "hugging_face":
        stated = hugging_face.normalization_of(source.preprocessor)
        if source.preprocessor and stated is None and not normalization:
            raise WeightsError(
                f"{source.path}: preprocessor_config.json has a mean and deviation that are none"
                f" of {', '.join(NORMALIZATIONS)}; say which to take: --normalization"
            )
        return hugging_face.description_of(
            source.state,
            source.config,
            normalization=normalization or stated or "half",
            source=source.path,
        )
    return _describe_by_shape(source, normalization=normalization, heads=heads)


def _describe_by_shape(source: Source, *, normalization: str, heads: int) -> Description:
    state = source.state
    try:
        patch = state["patch_embed.proj.weight"].shape[-1]
        grid = hugging_face.grid_of(state)
        if grid is None:
            raise WeightsError(f"{source.path} has neither absolute nor relative positions")
        positions = "relative_per_block"
        if "pos_embed" in state:
            positions = "absolute"
        elif "rel_pos_bias.relative_position_bias_table" in state:
            positions = "relative_shared"
        layers = unilm.blocks(state, r"blocks\.(\d+)\.")
        scale = None
        if "blocks.0.gamma_1" in state:
            # Not in the file; only a record, as gamma is. What the recipes start from.
            scale = 0.1 if layers <= 12 else 1e-5
        model = ModelConfig(
            layers=layers,
            width=state["cls_token"].shape[-1],
            heads=heads or source.config.get("num_heads") or unilm.heads(state),
            mlp_width=state["blocks.0.mlp.fc1.weight"].shape[0],
            image_size=grid * patch,
            patch_size=patch,
            positions=positions,
            layer_scale_init=scale,
        )
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{source.path}: missing {error}") from None
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{source.path}: {error}") from None
    task, outputs = "encoder", 0
    if "lm_head.weight" in state:
        task, outputs = "pretrain", state["lm_head.weight"].shape[0]
    elif "head.weight" in state:
        task, outputs = "classify", state["head.weight"].shape[0]
    pooling = "mean" if task == "pretrain" or "fc_norm.weight" in state else "none"
    if task != "pretrain" and "norm.weight" in state:
        pooling = "cls"
    if task == "classify" and pooling == "none":
        raise WeightsError(f"{source.path}: missing fc_norm.weight (or norm.weight)")
    return Description(
        task=task,
        model=model,
        outputs=outputs,
        pooling=pooling,
        mask_token=task == "encoder" and "mask_token" in state,
        normalization=normalization or source.preprocessor.get("normalization", "half"),
    )


def state_dict(whole: Any, *, source: str) -> dict[str, np.ndarray]:
    """The tensors by name in what a `.pth` holds: bare, wrapped, or a whole pickled module."""
    if isinstance(whole, pickles.Record):
        try:
            whole = pickles.module_state(whole)
        except (RecursionError, AttributeError):  # a module inside itself, or no dicts in it
            raise WeightsError(f"{source} holds a damaged module") from None
    for key in _WRAPPERS:
        if isinstance(whole, Mapping) and isinstance(whole.get(key), Mapping):
            whole = whole[key]
            break
    if not isinstance(whole, Mapping):
        raise WeightsError(f"{source} holds a {type(whole).__name__}, no state dict")
    state = {str(k): v for k, v in whole.items() if isinstance(v, np.ndarray)}
    if not state:
        raise WeightsError(f"{source} holds no tensors")
    if all(key.startswith("module.") for key in state):  # as DataParallel saves
        state = {key.removeprefix("module."): array for key, array in state.items()}
    return state


def load_safetensors(
    content: bytes, *, source: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, bfloat16 included; WeightsError if damaged."""
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        pickles.refuse_text(content, source=source)
        raise WeightsError(
            f"{source} ({len(content)} bytes) is not a whole safetensors file: {error}"
        ) from None
    state = {}
    for name, entry in sorted(entries, key=lambda each: each[0]):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightsError(f"{source}: {name} is stored as {entry['dtype']}, which is not read")
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        state[name] = flat.reshape(entry["shape"])
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return state, header.get("__metadata__", {})


def check_sha256(content: bytes, expected: str, *, source: str) -> str:
    """The content's SHA-256; raises WeightsError where another one is expected."""
    found = hashlib.sha256(content).hexdigest()
    if expected and expected.lower() != found:
        raise WeightsError(f"{source} has SHA-256 {found}, expected {expected}")
    return found


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _is_float(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16 or np.issubdtype(array.dtype, np.floating)
