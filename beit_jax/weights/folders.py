"""Which files of a folder, or of a repository on the hub, are its weights.

    choose(["config.json", "model.safetensors", "optimizer.pt"], source="run").file
    # "model.safetensors"

Hugging Face's names come first, then DeepSpeed's, then the one file of weights that is there.
"""

import dataclasses
import re
from collections.abc import Iterable

from etils import epath

from beit_jax.weights.containers import SUFFIXES
from beit_jax.weights.report import WeightsError

_BIN = "pytorch_model.bin"
# In the order of transformers' `from_pretrained`: safetensors first, and one file before several.
NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *(_BIN, f"{_BIN}.index.json"),
)
# The same names with a variant: model.fp16.safetensors, model.safetensors.index.fp16.json.
_VARIANTS = (
    re.compile(r"model\.\w+\.safetensors|model\.safetensors\.index\.\w+\.json"),
    re.compile(r"pytorch_model\.\w+\.bin|pytorch_model\.bin\.index\.\w+\.json"),
)
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.(safetensors|bin)")
# What Trainer, Accelerate and DeepSpeed keep beside the weights.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|adapter_)[\w.-]*"
    r"|.*_optim_states\.pt|zero_pp_rank_.*|tokenizer\.safetensors"
)
# Weights in containers that are not read, and what to do about them.
_FOREIGN = re.compile(r"flax_model\..*|tf_model\..*|model\.onnx|adapter_model\..*|.*\.distcp")
_TRAINER = re.compile(r"checkpoint-\d+")
_DEEPSPEED = "mp_rank_00_model_states.pt"
_DEEPSPEED_LATEST = "latest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The weights of a folder.

    Attributes:
      file: its path within the folder; an index where `is_index` says so.
      note: a line for the report; "" where there was nothing to choose.
      half_note: another, where the weights turn out to be in half precision.
    """

    file: str
    note: str = ""
    half_note: str = ""


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index of shards, with or without a variant."""
    return re.fullmatch(r".+\.(safetensors|bin)\.index(\.\w+)?\.json", name) is not None


def is_named(name: str) -> bool:
    """Whether a file's name is Hugging Face's for weights, with or without a variant."""
    return name in NAMES or any(pattern.fullmatch(name) for pattern in _VARIANTS)


def is_shard(name: str) -> bool:
    """Whether a file's name says that it is one of several."""
    match = _SHARD.fullmatch(name)
    return match is not None and int(match[2]) > 1


def choose(names: Iterable[str], *, source: str) -> Choice:
    """The weights among the files of a folder.

    Args:
      names: of the folder's files, without those in folders of it.
      source: for messages.

    Raises:
      WeightsError: none are there, or several that could be meant; they are named.
    """
    names = sorted(names)
    choice = _hugging_face(names, source=source)
    if choice is not None:
        return choice
    # Beside pieces, Lightning keeps a meta.pt, which has no weights.
    in_pieces = any(name.endswith(".distcp") for name in names)
    files = [name for name in names if _is_weights(name) and not in_pieces]
    if len(files) > 1:
        raise WeightsError(
            f"{source} holds several files of weights, {_some(files)}; give the path of one"
        )
    if not files:
        raise WeightsError(f"{source} {_why_none(names)}")
    return Choice(file=files[0], note=f"weights: {files[0]}, the only ones in the folder")


def find(folder: epath.Path, *, source: str) -> Choice:
    """The weights of a folder on disk, those of DeepSpeed's and Trainer's folders included.

    Raises:
      WeightsError: as `choose`.
    """
    names = [entry.name for entry in folder.iterdir()]
    if NAMES[0] not in names and (folder / _BIN).is_dir():  # newer zero_to_fp32.py makes a folder
        nested = find(folder / _BIN, source=f"{source}/{_BIN}")
        return dataclasses.replace(nested, file=f"{_BIN}/{nested.file}")
    choice = _hugging_face(names, source=source) or _deepspeed(folder, names, source=source)
    if choice is not None:
        return choice
    inner = [name for name in names if _TRAINER.fullmatch(name)]
    if inner and not any(_is_weights(name) for name in names):
        inner.sort(key=lambda name: int(name.rpartition("-")[2]))
        raise WeightsError(f"{source} holds no weights itself; give one of {_some(inner)} in it")
    return choose(names, source=source)


def has_weights(folder: epath.Path) -> bool:
    """Whether a folder has files that `find` would choose from or has a word to say about."""
    names = [entry.name for entry in folder.iterdir()]
    return (folder / _DEEPSPEED_LATEST).is_file() or any(
        name in (*NAMES, _DEEPSPEED)
        or _is_weights(name)
        or is_index(name)
        or is_shard(name)
        or _FOREIGN.fullmatch(name)
        or _TRAINER.fullmatch(name)
        for name in names
    )


def _hugging_face(names: Iterable[str], *, source: str) -> Choice | None:
    for name in NAMES:
        if name in names:
            return Choice(file=name)
    for pattern in _VARIANTS:
        found = [name for name in names if pattern.fullmatch(name)]
        if len(found) > 1:
            raise WeightsError(
                f"{source} holds several variants of its weights, {_some(sorted(found))}, and no"
                f" {NAMES[0]}; keep one of them in the folder"
            )
        if found:
            return Choice(
                file=found[0], note=f"weights: the variant {found[0]}, the only ones there"
            )
    return None


def _deepspeed(folder: epath.Path, names: list[str], *, source: str) -> Choice | None:
    """The model states of a checkpoint folder, or of the newest in a folder of them."""
    tag = ""
    if _DEEPSPEED_LATEST in names and (folder / _DEEPSPEED_LATEST).is_file():
        with (folder / _DEEPSPEED_LATEST).open("rb") as file:
            tag = file.read(256).decode(errors="replace").strip()
        if not re.fullmatch(r"[\w][\w.=+-]*", tag):  # a name, never a path out of the folder
            raise WeightsError(
                f"{source}: the file {_DEEPSPEED_LATEST} names no folder: {tag[:60]!r}"
            )
        if not (folder / tag).is_dir():
            raise WeightsError(
                f"{source}: the file {_DEEPSPEED_LATEST} names {tag}, which is not there"
            )
        names = [entry.name for entry in (folder / tag).iterdir()]
    if any(re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name) for name in names):
        raise WeightsError(
            f"{source} is a checkpoint of DeepSpeed's ZeRO-3, whose weights are in pieces; put them"
            " together first: `python zero_to_fp32.py . whole` in its folder"
        )
    if any(re.fullmatch(r"mp_rank_(?!00_)\d+_model_states\.pt", name) for name in names):
        raise WeightsError(
            f"{source} is a checkpoint of DeepSpeed's tensor parallelism, which is not read"
        )
    if _DEEPSPEED not in names:
        return None
    file = f"{tag}/{_DEEPSPEED}" if tag else _DEEPSPEED
    has_float32 = any(name.endswith("_optim_states.pt") for name in names)
    half_note = "weights: in half precision; zero_to_fp32.py in the folder writes the float32 ones"
    return Choice(
        file=file,
        note=f"weights: {file} of DeepSpeed's checkpoint",
        half_note=half_note if has_float32 else "",
    )


def _is_weights(name: str) -> bool:
    is_named = name.endswith(SUFFIXES) and not name.startswith(".")
    return is_named and not is_shard(name) and not _NOT_WEIGHTS.fullmatch(name)


def _why_none(names: list[str]) -> str:
    if any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed, whose weights are in pieces; put them together"
            " first: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    if any(name.startswith("adapter_model.") for name in names):
        return (
            "holds an adapter, not a model; merge it into its model first (PEFT's merge_and_unload)"
        )
    shards = [name for name in names if is_shard(name)]
    if shards:
        return f"holds shards, {_some(shards)}, without the index that names them"
    foreign = [name for name in names if _FOREIGN.fullmatch(name)]
    if foreign:
        return f"holds {_some(foreign)}, which is not read; save it with PyTorch or as safetensors"
    return f"holds no weights: no {NAMES[0]}, and no other file that is read"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
