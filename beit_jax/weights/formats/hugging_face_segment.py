"""Hugging Face's two segmentation models with a BEiT in them, and their `config.json`.

`UperNetForSemanticSegmentation` on a `BeitBackbone` with a pyramid is the official graph: its
out_indices i are the states after i blocks. `BeitForSemanticSegmentation` reads the states after
i - 1 blocks for its own (transformers 5.24: `encoder_hidden_states[i - 1]`, whose first is the
embedding), so the published [3, 5, 7, 11] are blocks 2, 4, 6 and 10 there, where the same weights
were trained with 4, 6, 8 and 12. Here the blocks are what the class reads, so that either gives the
logits that it gave there.
"""

import dataclasses
import re

from beit_jax.config import ModelConfig
from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.models.segmentation_heads.pyramid import largest_scale
from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description
from beit_jax.weights.formats import fields, hugging_face_config
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.formats.format import Opened, State, Stated
from beit_jax.weights.formats.hugging_face_config import Config
from beit_jax.weights.formats.hugging_face_fields import KEPT, UPERNET_ONLY, UPERNET_USED
from beit_jax.weights.formats.hugging_face_keys import ENCODER, version_4
from beit_jax.weights.formats.segmenter_keys import LEVELS, head_of, segmenter_rows
from beit_jax.weights.keys import Table
from beit_jax.weights.report import WeightsError

UPERNET, BEIT = "UperNetForSemanticSegmentation", "BeitForSemanticSegmentation"
_BACKBONE = "backbone."
_SHARED = "encoder.relative_position_bias."
# What files keep though nothing reads it: of the model that the encoder was pre-trained as.
BEIT_LEFT_OUT = ("beit.embeddings.mask_token", "beit.layernorm", "beit.pooler", "lm_head")
UPERNET_LEFT_OUT = (
    *("backbone.embeddings.mask_token", "backbone.beit.layernorm", "backbone.layernorm"),
    *("backbone.beit.pooler", "backbone.pooler"),
)
# What the neck and the heads are called in a model of transformers 5 → in files.
_VERSION_5 = (
    (r"^(backbone\.)?fpn\.fpn1\.conv_transpose1\.", r"\1fpn1.0."),
    (r"^(backbone\.)?fpn\.fpn1\.normalization\.", r"\1fpn1.1."),
    (r"^(backbone\.)?fpn\.fpn1\.conv_transpose2\.", r"\1fpn1.3."),
    (r"^(backbone\.)?fpn\.fpn2\.", r"\1fpn2.0."),
    (r"^decode_head\.psp_modules\.blocks\.(\d+)\.conv\.", r"decode_head.psp_modules.\1.1."),
    (r"^decode_head\.psp_bottleneck\.", "decode_head.bottleneck."),
)
_IN_HEAD = (
    (r"^((?:decode|auxiliary)_head\..*)\.convolution\.", r"\1.conv."),
    (r"^((?:decode|auxiliary)_head\..*)\.normalization\.", r"\1.bn."),
)


def is_upernet(state: State) -> bool:
    """Whether the keys are those of a UperNet on a BEiT."""
    return any(key.startswith("decode_head.") for key in state) and any(
        key in state
        for key in ("backbone.embeddings.cls_token", "backbone.beit.embeddings.cls_token")
    )


def is_beit(state: State) -> bool:
    """Whether the keys are those of `BeitForSemanticSegmentation`."""
    heads = any(key.startswith("decode_head.") for key in state)
    return heads and "beit.embeddings.cls_token" in state


def canonical_upernet(state: State) -> State:
    """The names that files have, whatever version's they are.

    transformers 5 saves some of a backbone's names behind "beit." and some without.
    """

    def name(key: str) -> str:
        if key.startswith(f"{_BACKBONE}fpn") or not key.startswith(_BACKBONE):
            return _in_files(key)
        inner = version_4(f"beit.{key.removeprefix(_BACKBONE).removeprefix('beit.')}")
        return _in_backbone(inner)

    return {name(key): array for key, array in state.items()}


def canonical_beit(state: State) -> State:
    """The names that files have, whatever version's they are."""
    return {_in_files(version_4(key)): array for key, array in state.items()}


def _in_files(key: str) -> str:
    for pattern, name in (*_VERSION_5, *_IN_HEAD):
        key = re.sub(pattern, name, key)
    return key


def _in_backbone(key: str) -> str:
    """A key of a BEiT → that of a UperNet's backbone, as transformers 5 writes it."""
    inner = key.removeprefix("beit.")
    return f"{_BACKBONE}beit.{inner}" if inner.startswith(_SHARED) else f"{_BACKBONE}{inner}"


def encoder_state(state: State) -> State:
    """The tensors of a UperNet's backbone, its pyramid left out, by the names of a BEiT."""
    return {
        f"beit.{key.removeprefix(_BACKBONE).removeprefix('beit.')}": array
        for key, array in state.items()
        if key.startswith(_BACKBONE)
    }


def upernet_table(description: Description) -> Table:
    """The keys of `UperNetForSemanticSegmentation`."""
    encoder = tuple(dataclasses.replace(row, foreign=_in_backbone(row.foreign)) for row in ENCODER)
    return encoder + segmenter_rows(description, neck=_BACKBONE, norm="batch_norm")


def beit_table(description: Description) -> Table:
    """The keys of `BeitForSemanticSegmentation`."""
    return ENCODER + segmenter_rows(description, neck="")


def read_upernet(opened: Opened, *, stated: Stated) -> tuple[Config, SegmentHeadConfig]:
    """Reads a UperNet's `config.json`.

    Raises:
      WeightsError: it is another model's, or a field is unknown, wrong, or of another function.
    """
    config, source = opened.config, f"{opened.path}: config.json"
    if config.get("model_type") != "upernet":
        raise WeightsError(f"{source} describes a {quoted(config.get('model_type'))}, no UperNet")
    if config.get("architectures") not in (None, [], [UPERNET]):
        raise WeightsError(f"{source}: architectures is {quoted(config['architectures'])}")
    fields.check_fields(config, used=UPERNET_USED, only=UPERNET_ONLY, kept=KEPT, source=source)
    inner = fields.section(config, "backbone_config", source=source)
    backbone = f"{opened.path}: backbone_config"
    read = hugging_face_config.read_config(inner, stated=stated, source=backbone)
    if inner.get("architectures") not in (None, [], ["BeitBackbone"]):
        raise WeightsError(f"{source}: backbone_config is not of a BeitBackbone")
    for name, default in (("add_fpn", False), ("reshape_hidden_states", True)):
        if not fields.flag(inner, name, default=default, source=backbone):
            raise WeightsError(
                f"{source}: backbone_config has {name} false; the official model has a pyramid"
            )
    check_pyramid(read.model, source=f"{backbone}: ")
    width = read.model.width
    inside = fields.integer(config, "auxiliary_in_channels", default=width, source=source)
    if inside != width:
        raise WeightsError(f"{source}: auxiliary_in_channels is {inside}, the backbone's {width}")
    blocks = _indices(inner, layers=read.model.layers, source=backbone)
    channels = fields.integer(config, "hidden_size", default=512, source=source)
    head = _head(config, blocks=blocks, channels=channels, source=source)
    return read, head


def read_beit(opened: Opened, *, stated: Stated) -> tuple[Config, SegmentHeadConfig]:
    """Reads the `config.json` of a `BeitForSemanticSegmentation`.

    Raises:
      WeightsError: it is another model's, or a field is unknown, wrong, or of another function.
    """
    config, source = opened.config, f"{opened.path}: config.json"
    read = hugging_face_config.read_config(config, stated=stated, source=opened.path)
    if read.task not in ("", "segment"):
        raise WeightsError(
            f"{source}: architectures is {quoted(config.get('architectures'))}, and the tensors"
            " are a segmentation model's"
        )
    check_pyramid(read.model, source=f"{source}: ")
    indices = _indices(config, layers=read.model.layers, source=source)
    if min(indices) < 2:
        raise WeightsError(
            f"{source}: out_indices is {quoted(list(indices))}; below 2 it is no block that"
            f" {BEIT} reads"
        )
    blocks = tuple(index - 1 for index in indices)
    return read, _head(config, blocks=blocks, channels=read.model.width, source=source)


def check_pyramid(model: ModelConfig, *, source: str = "") -> None:
    """Raises WeightsError for patches whose pyramid is another one in transformers.

    Its largest map always has four times the side of the grid; the official code's, which this
    project's models have, twice where patches have 8 pixels. Of an export, transformers would draw
    the rest at random.

    Args:
      model: the encoder.
      source: what a message begins with.
    """
    if largest_scale(model) != 4:
        raise WeightsError(
            f"{source}patches of {model.patch_size} pixels have another pyramid in transformers"
            " (4 times the grid) than in the official code and here (2 times); mmseg's files hold"
            " it: --format mmseg"
        )


def _indices(config: JsonObject, *, layers: int, source: str) -> tuple[int, ...]:
    """`out_indices`, or the name of old files for them, or `out_features`."""
    found = config.get("out_indices")
    if found is None:
        found = config.get("segmentation_indices")
    features = config.get("out_features")
    if found is None and isinstance(features, list):
        found = [_stage(feature) for feature in features]
    if (
        not isinstance(found, list)
        or len(found) != LEVELS
        or not all(type(index) is int and -layers <= index <= layers for index in found)
    ):
        raise WeightsError(
            f"{source}: out_indices is {quoted(found)}, not {LEVELS} numbers of blocks up to"
            f" {layers}"
        )
    return tuple(index if index >= 0 else layers + 1 + index for index in found)


def _stage(feature: Json) -> int | None:
    match = re.fullmatch(r"stage(\d{1,4})", feature) if isinstance(feature, str) else None
    return int(match[1]) if match else None


def _head(
    config: JsonObject, *, blocks: tuple[int, ...], channels: int, source: str
) -> SegmentHeadConfig:
    def whole(name: str, default: int, least: int = 0) -> int:
        return fields.integer(config, name, default=default, source=source, least=least)

    scales = config.get("pool_scales", [1, 2, 3, 6])
    if not isinstance(scales, list) or not all(type(scale) is int for scale in scales):
        raise WeightsError(f"{source}: pool_scales is {quoted(scales)}, no list of whole numbers")
    with_auxiliary = fields.flag(config, "use_auxiliary_head", default=True, source=source)
    try:
        return SegmentHeadConfig(
            blocks=blocks,
            channels=channels,
            pool_scales=tuple(scales),
            auxiliary_channels=whole("auxiliary_channels", 256, 1) if with_auxiliary else 0,
            auxiliary_convs=whole("auxiliary_num_convs", 1),
            auxiliary_concat=fields.flag(
                config, "auxiliary_concat_input", default=False, source=source
            ),
            auxiliary_weight=fields.number(
                config, "auxiliary_loss_weight", default=0.4, source=source, least=0, most=1000
            ),
        )
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def upernet_json(description: Description, *, kept: JsonObject) -> JsonObject:
    """`config.json` of `UperNetForSemanticSegmentation`.

    Args:
      description: a segmenter.
      kept: `Config.kept` of the file that it was imported from.

    Raises:
      WeightsError: the class has no such pyramid.
    """
    head = head_of(description)
    check_pyramid(description.model)
    backbone = _encoder_json(description, kept=kept)
    del backbone["torch_dtype"]
    backbone |= {"architectures": ["BeitBackbone"], "add_fpn": True, **_stages(head.blocks)}
    return {
        "architectures": [UPERNET],
        "backbone_config": backbone,
        "auxiliary_in_channels": description.model.width,
        "hidden_size": head.channels or description.model.width,
        "initializer_range": 0.02,
        "loss_ignore_index": 255,
        "model_type": "upernet",
        "torch_dtype": "float32",
        **_head_json(head),
        **hugging_face_config.labels_json(description),
    }


def beit_json(description: Description, *, kept: JsonObject) -> tuple[JsonObject, str]:
    """`config.json` of `BeitForSemanticSegmentation`, and a line where it can't be the same graph.

    Args:
      description: a segmenter.
      kept: `Config.kept` of the file that it was imported from.

    Raises:
      WeightsError: the class has no such pyramid or head.
    """
    head, model = head_of(description), description.model
    check_pyramid(model)
    if head.channels not in (0, model.width):
        raise WeightsError(
            f"{BEIT} has a head as wide as its encoder, {model.width}, this one {head.channels}"
        )
    # The class reads no state after the last block: its own index for it is out of range.
    blocks = tuple(min(block, model.layers - 1) for block in head.blocks)
    if len(set(blocks)) < len(blocks):
        raise WeightsError(
            f"{BEIT} does not read block {model.layers}, the last one, and this head reads the one"
            f" before it already; {UPERNET} can: --format hugging_face"
        )
    note = ""
    if blocks != head.blocks:
        note = (
            f"other logits: {BEIT} can't read block {model.layers}, the last one, and reads block"
            f" {model.layers - 1} in its place; {UPERNET} is the same function (--format"
            " hugging_face)"
        )
    config = _encoder_json(description, kept=kept) | {
        "architectures": [BEIT],
        **_stages(tuple(block + 1 for block in blocks)),
        **_head_json(head),
        **hugging_face_config.labels_json(description),
    }
    return config, note


def _encoder_json(description: Description, *, kept: JsonObject) -> JsonObject:
    bare = dataclasses.replace(
        description, task="encoder", outputs=0, labels=(), head=None, pooling="mean"
    )
    return hugging_face_config.config_json(bare, kept=kept)


def _stages(indices: tuple[int, ...]) -> JsonObject:
    return {
        "out_features": [f"stage{index}" for index in indices],
        "out_indices": list(indices),
    }


def _head_json(head: SegmentHeadConfig) -> JsonObject:
    """The fields that both classes have for the head."""
    default = SegmentHeadConfig()
    return {
        "auxiliary_channels": head.auxiliary_channels or default.auxiliary_channels,
        "auxiliary_concat_input": head.auxiliary_concat,
        "auxiliary_loss_weight": head.auxiliary_weight,
        "auxiliary_num_convs": head.auxiliary_convs,
        "pool_scales": list(head.pool_scales),
        "use_auxiliary_head": bool(head.auxiliary_channels),
    }
