"""Hugging Face: a folder with config, safetensors, image processor and model card.

The key names are the hub's (`microsoft/beit-*`), which are transformers 4's own; transformers 5
renames them on loading and writes them again on saving.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from etils import epath

from beit_jax.config import ModelConfig
from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.files import json_bytes, write_together
from beit_jax.types import JsonObject
from beit_jax.weights import containers, keys, resize
from beit_jax.weights.description import Description
from beit_jax.weights.formats import hugging_face_config, hugging_face_segment
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    State,
    Stated,
    Written,
)
from beit_jax.weights.formats.hugging_face_config import Config
from beit_jax.weights.formats.hugging_face_keys import ENCODER, version_4
from beit_jax.weights.formats.model_card import model_card
from beit_jax.weights.formats.segmenter_keys import check_upernet
from beit_jax.weights.formats.unilm import is_index_buffer
from beit_jax.weights.formats.view import View, kept_of
from beit_jax.weights.keys import LINEAR, Table, norm, weight_and_bias
from beit_jax.weights.report import WeightsError

# The final norm has two names: BeitForMaskedImageModeling holds it beside BeitModel, the others
# inside. `use_mean_pooling` must be true for the former, or BeitModel adds a second one.
TABLES: dict[str, Table] = {
    "pretrain": (
        *ENCODER,
        *norm("layernorm", "encoder/norm"),
        *weight_and_bias("lm_head", "lm_head", LINEAR),
    ),
    "classify": (
        *ENCODER,
        *norm("beit.layernorm", "encoder/norm"),
        *norm("beit.pooler.layernorm", "fc_norm"),
        *weight_and_bias("classifier", "head", LINEAR),
    ),
    "encoder": (
        *ENCODER,
        *norm("beit.layernorm", "encoder/norm"),
        *norm("beit.pooler.layernorm", "fc_norm"),
    ),
}
# What files commonly keep though a kind has no use for it: a classifier that was fine-tuned from a
# pre-trained model has its mask token, a pre-trained one may have a pooler.
_FINAL_NORMS = ("beit.layernorm", "beit.pooler")  # of the class token, of the mean
_LEFT_OUT = {
    "pretrain": (*_FINAL_NORMS, "classifier"),
    "classify": ("beit.embeddings.mask_token", "layernorm", "lm_head"),
    "encoder": ("layernorm", "lm_head", "classifier"),
}


def write(export: Export) -> Written:
    """Writes the folder that transformers' `from_pretrained` loads.

    Raises:
      WeightsError: the output is a file, or transformers has no such model.
    """
    description = export.description
    if description.task == "segment":
        check_upernet(description, format="transformers")
        return write_folder(
            export,
            class_name=hugging_face_segment.UPERNET,
            config=hugging_face_segment.upernet_json(description, kept=kept_config(export)),
            table=hugging_face_segment.upernet_table(description),
        )
    # BeitModel adds a pooler unless told not to; its norm would be random.
    no_pooler = description.task == "encoder" and description.pooling == "none"
    return write_folder(
        export,
        class_name=hugging_face_config.CLASSES[description.task],
        config=hugging_face_config.config_json(description, kept=kept_config(export)),
        table=TABLES[description.task],
        options=", add_pooling_layer=False" if no_pooler else "",
    )


def write_folder(
    export: Export,
    *,
    class_name: str,
    config: JsonObject,
    table: Table,
    options: str = "",
    notes: tuple[str, ...] = (),
) -> Written:
    """Writes config, tensors, image processor and model card.

    Args:
      export: the checkpoint.
      class_name: of the class in transformers that loads it.
      config: the content of `config.json`.
      table: keys.
      options: arguments of `from_pretrained` behind the folder.
      notes: lines for the report.

    Raises:
      WeightsError: the output is a file.
    """
    folder, description = epath.Path(export.output), export.description
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{export.output} is a file; a Hugging Face export is a folder")
    state = keys.to_foreign(export.params, table)
    card = model_card(
        description,
        class_name=class_name,
        config=export.config,
        metrics=export.metrics,
        source=export.source,
        name=folder.name,
    )
    preprocessor = hugging_face_config.preprocessor_json(description, config=export.config)
    contents = {
        "config.json": json_bytes(config),
        "preprocessor_config.json": json_bytes(preprocessor),
        "README.md": card.encode(),
        # "format" is what transformers looks for first.
        "model.safetensors": containers.safetensors_bytes(state, metadata={"format": "pt"}),
    }
    write_together(folder, contents, needed_by_all="config.json")
    return Written(
        load=f"transformers.{class_name}.from_pretrained({export.output!r}{options})",
        used=tuple(export.params),
        files={name: str(folder / name) for name in contents},
        notes=notes,
    )


def kept_config(export: Export) -> JsonObject:
    """What the `config.json` said that the checkpoint was imported from; {} for any other."""
    kept = kept_of(export.config)
    return kept.get("config", {}) if str(kept.get("format")).startswith("hugging_face") else {}


def detect(opened: Opened) -> bool:
    """Whether the keys are those of transformers' BEiT, with its prefix or without, or UperNet."""
    if hugging_face_segment.is_upernet(opened.state):
        return True
    return any(key.startswith("beit.") for key in canonical(opened.state))


def canonical(state: State) -> State:
    """Gives every key the prefix "beit.".

    The larger models' files have it; those of a bare model don't, and Data2VecVision, which is a
    BEiT under another name, has its own. BeitBackbone's files have it for a shared table alone.
    """
    if hugging_face_segment.is_upernet(state):
        return hugging_face_segment.canonical_upernet(state)
    if "embeddings.cls_token" in state:
        state = {f"beit.{key.removeprefix('beit.')}": array for key, array in state.items()}
    if any(key.startswith("beit.layers.") for key in state):
        return {version_4(key): array for key, array in state.items()}
    if "data2vec_vision.embeddings.cls_token" in state:
        return {re.sub("^data2vec_vision", "beit", key): array for key, array in state.items()}
    return state


def describe(opened: Opened, *, stated: Stated) -> Described:
    """Describes a folder by its `config.json`, and by its keys where that does not say.

    Args:
      opened: its keys as `canonical` gives them.
      stated: the caller's own facts.

    Raises:
      WeightsError: there is no config, it is not a BEiT's, has an impossible value or one of
        another function, or does not fit the tensors.
    """
    state, source = opened.state, opened.path
    check_has_config(opened)
    if hugging_face_segment.is_upernet(state):
        return _describe_upernet(opened, stated=stated)
    if any(key.startswith(("decode_head.", "beit.fpn")) for key in state):
        raise WeightsError(
            f"{source} is a part of a segmentation model, or one of another architecture, which is"
            " not read"
        )
    config = hugging_face_config.read_config(opened.config, stated=stated, source=source)
    _check_sizes(config.model, state, source=source)
    if config.task == "segment":
        raise WeightsError(f"{source}: config.json's is a segmentation model, the tensors are not")
    task = config.task or _task_of_keys(state)
    pooling, norms_left = _pooling(config, task, opened)
    outputs, labels, notes = _outputs(config, task, opened)
    said, view, guessed = _facts(opened, config, stated=stated)
    return Described(
        description=Description(
            task=task,
            model=config.model,
            outputs=outputs,
            pooling=pooling,
            mask_token=task == "encoder" and "beit.embeddings.mask_token" in state,
            normalization=stated.normalization or said or "half",
            labels=labels,
        ),
        guessed=guessed,
        left_out=(*_LEFT_OUT[task], *norms_left),
        kept=_kept(opened, config, said=said, view=view, format="hugging_face"),
        notes=notes,
    )


def check_has_config(opened: Opened) -> None:
    """Raises WeightsError for tensors without the `config.json` that says what they are."""
    if not opened.config:
        raise WeightsError(
            f"{opened.path} has Hugging Face's keys; give the folder that also has config.json"
        )


def _facts(opened: Opened, config: Config, *, stated: Stated) -> tuple[str, View, dict[str, str]]:
    """The normalisation that the folder says, "" for none; the view; and what is guessed."""
    guessed = {}
    if config.epsilon_guess and stated.layer_norm_epsilon is None:
        guessed["layer_norm_epsilon"] = config.epsilon_guess
    said, view = "", View(squash=True)
    if opened.preprocessor:
        said, view = hugging_face_config.read_preprocessor(
            opened.preprocessor,
            stated=stated,
            image_size=config.model.image_size,
            source=opened.path,
        )
    elif not stated.normalization:
        guessed["normalization"] = (
            "half: there is no preprocessor_config.json (--normalization says otherwise)"
        )
    return said, view, guessed


def _kept(opened: Opened, config: Config, *, said: str, view: View, format: str) -> JsonObject:
    return {
        "format": format,
        "config": config.kept,
        "preprocessor": opened.preprocessor,
        "view": dataclasses.asdict(view),
        "image_size": config.model.image_size,
        "normalization": said,
    }


def _describe_upernet(opened: Opened, *, stated: Stated) -> Described:
    config, head = hugging_face_segment.read_upernet(opened, stated=stated)
    return describe_segmenter(
        opened,
        config,
        head,
        stated=stated,
        encoder=hugging_face_segment.encoder_state(opened.state),
        left_out=hugging_face_segment.UPERNET_LEFT_OUT,
        format="hugging_face",
    )


def describe_segmenter(
    opened: Opened,
    config: Config,
    head: SegmentHeadConfig,
    *,
    stated: Stated,
    encoder: State,
    left_out: tuple[str, ...],
    format: str,
) -> Described:
    """Describes a segmentation model whose `config.json` has been read.

    Args:
      opened: the folder.
      config: the encoder's settings.
      head: the heads' settings.
      stated: the caller's own facts.
      encoder: the encoder's tensors by the names of a BEiT.
      left_out: for `Described`.
      format: the format's name.

    Raises:
      WeightsError: config and tensors don't agree.
    """
    _check_sizes(config.model, encoder, source=opened.path)
    classes, labels, notes = _classes(opened, "decode_head.classifier.weight", dimensions=4)
    # Said of the field, where a hundred shapes would differ.
    for field, module, wanted in (
        ("hidden_size", "decode_head", head.channels),
        ("auxiliary_channels", "auxiliary_head", head.auxiliary_channels),
    ):
        found = _dimension(opened.state, f"{module}.classifier.weight", 1)
        if wanted and found not in (None, wanted):
            raise WeightsError(
                f"{opened.path}: config.json's {field} is {wanted}, the tensors' {found}"
            )
    said, view, guessed = _facts(opened, config, stated=stated)
    normalization = stated.normalization or said or "half"
    if normalization == "half" and not stated.normalization:
        notes += (
            "normalization: half; the official segmentation models are trained with imagenet's mean"
            " and deviation (--normalization imagenet takes them)",
        )
    return Described(
        description=Description(
            task="segment",
            model=config.model,
            outputs=classes,
            normalization=normalization,
            labels=labels,
            head=head,
        ),
        guessed=guessed,
        left_out=left_out,
        kept=_kept(opened, config, said=said, view=view, format=format),
        notes=notes,
    )


def _task_of_keys(state: State) -> str:
    if "classifier.weight" in state:
        return "classify"
    return "pretrain" if "lm_head.weight" in state else "encoder"


def _pooling(config: Config, task: str, opened: Opened) -> tuple[str, tuple[str, ...]]:
    """How the tokens are pooled, and the final norm that this leaves without a use."""
    if task == "pretrain":
        if not config.mean_pooling:
            raise WeightsError(
                f"{opened.path}: config.json: a masked image model with use_mean_pooling false"
                " applies two final norms, which this project's models do not"
            )
        return "mean", ()
    if config.backbone:  # its feature maps are of tokens before the norm
        return "none", ("beit.layernorm",)
    if not config.mean_pooling:
        return "cls", ("beit.pooler",)
    if task == "encoder" and "beit.pooler.layernorm.weight" not in opened.state:
        return "none", ("beit.layernorm",)
    return "mean", ("beit.layernorm",)


def _outputs(
    config: Config, task: str, opened: Opened
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """The head's outputs, their labels, and what to say of these."""
    if task == "encoder":
        return 0, (), ()
    if task == "pretrain":
        return config.vocabulary, (), ()
    return _classes(opened, "classifier.weight", dimensions=2)


def _classes(
    opened: Opened, key: str, *, dimensions: int
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """The classes of a head by its last tensor, their labels, and what to say of these."""
    head = opened.state.get(key)
    if head is None or head.ndim != dimensions or not head.shape[0]:
        raise WeightsError(f"{opened.path}: no {key} [classes, width]")
    classes = head.shape[0]
    labels = hugging_face_config.read_labels(opened.config, classes=classes, source=opened.path)
    notes: tuple[str, ...] = ()
    if not labels and opened.config.get("id2label"):
        count = len(opened.config["id2label"])
        notes = (f"labels left out: config.json has {count}, the classifier {classes} classes",)
    return classes, labels, notes


def _check_sizes(model: ModelConfig, state: State, *, source: str) -> None:
    """Raises WeightsError where the config and the tensors have different sizes.

    The strict comparison of names and shapes comes later; this one says which field is wrong, and
    keeps an absurd size from being worked with.
    """
    block = "beit.encoder.layer"
    layers = {match[1] for key in state if (match := re.match(rf"{block}\.(\d+)\.", key))}
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    positions = "beit.embeddings.position_embeddings"
    found = {
        "hidden_size": _dimension(state, "beit.embeddings.cls_token", -1),
        "num_hidden_layers": 1 + max(map(int, layers), default=-1),
        "intermediate_size": _dimension(state, f"{block}.0.intermediate.dense.weight", 0),
        "patch_size": _dimension(state, "beit.embeddings.patch_embeddings.projection.weight", -1),
    }
    wanted = {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.mlp_width,
        "patch_size": model.patch_size,
    }
    if tables:
        found["num_attention_heads"] = _dimension(state, tables[0], -1)
        wanted["num_attention_heads"] = model.heads
        rows = _dimension(state, tables[0], 0)
        found["image_size"] = rows if rows is None else _side(resize.grid_of_table, rows, model)
        wanted["image_size"] = model.image_size
    elif positions in state:
        rows = _dimension(state, positions, 1)
        found["image_size"] = None if rows is None else _side(_grid_of_positions, rows, model)
        wanted["image_size"] = model.image_size
    else:
        raise WeightsError(f"{source} does not fit: there are no positions")
    for name, value in found.items():
        if value is None:
            raise WeightsError(f"{source} does not fit: the tensor that shows {name} is missing")
        if value != wanted[name]:
            raise WeightsError(
                f"{source}: config.json's {name} is {wanted[name]}, the tensors' {value}"
            )


def _dimension(state: State, key: str, axis: int) -> int | None:
    """One axis of a tensor; None where it is missing or has too few."""
    array = state.get(key)
    needed = axis + 1 if axis >= 0 else -axis
    return None if array is None or array.ndim < needed else array.shape[axis]


def _side(grid: Callable[[int], int], rows: int, model: ModelConfig) -> int:
    """The image's side for a table of `rows`; 0 where they make no square."""
    try:
        return grid(rows) * model.patch_size
    except ValueError:
        return 0


def _grid_of_positions(rows: int) -> int:
    side = math.isqrt(max(rows - 1, 0))
    if side * side + 1 != rows:
        raise ValueError(f"{rows} positions are no square and a class token")
    return side


def in_encoder(key: str) -> bool:
    """Whether a key, known or not, is of the encoder."""
    name = key.removeprefix("backbone.").removeprefix("beit.")
    return name != key and name.startswith(("embeddings.", "encoder."))


def _table(description: Description) -> Table:
    if description.task == "segment":
        return hugging_face_segment.upernet_table(description)
    return TABLES[description.task]


FORMAT = Format(
    name="hugging_face",
    help="a folder that transformers' from_pretrained loads",
    suffix="",
    kinds=("pretrain", "classify", "encoder", "segment"),
    write=write,
    reader=Reader(
        detect=detect,
        describe=describe,
        table=_table,
        canonical=canonical,
        in_encoder=in_encoder,
        rebuilt=is_index_buffer,
    ),
)
