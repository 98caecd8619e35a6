"""What OpenMMLab's checkpoints say beside their tensors: class names, and the config as text.

`meta["config"]` is a Python file of assignments, as mmcv prints it. It is parsed and never run:
names, numbers, lists and calls of `dict` are read, and of anything else the text. Every setting of
the model is read, has the only value that this project's models have, or is known to change nothing
in evaluation; another one is refused.
"""

import ast
import dataclasses

import numpy as np

from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import Json, JsonObject
from beit_jax.weights.formats import fields
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.report import WeightsError

_LONGEST = 1_000_000  # characters
_OFFICIAL_OUT_INDICES = [3, 5, 7, 11]  # the default of the official backbone, of any depth
PATCHES = (16, 8)  # pixels; of others the official backbone has no pyramid

# mmseg 0.11's settings. Sizes are in the tensors, which are compared by name and shape.
_MODEL_USED = frozenset(("backbone", "decode_head", "auxiliary_head"))
_MODEL_ONLY: dict[str, tuple[Json, ...]] = {"type": ("EncoderDecoder",), "neck": ({},)}
_MODEL_KEPT = frozenset(("pretrained", "train_cfg", "test_cfg", "init_cfg"))
_BACKBONE_USED = frozenset(("out_indices", "num_heads", "patch_size"))
_BACKBONE_ONLY: dict[str, tuple[Json, ...]] = {
    "type": ("BEiT", "BEiTv2"),
    "in_chans": (3,),
    **dict.fromkeys(("qk_scale", "hybrid_backbone", "norm_layer"), (None,)),
}
# fmt: off
_BACKBONE_KEPT = frozenset((
    "attn_drop_rate", "depth", "drop_path_rate", "drop_rate", "embed_dim", "img_size", "init_cfg",
    "init_values", "interpolation_type", "mlp_ratio", "num_classes", "pretrained", "qkv_bias",
    "rel_pos_bias_interpolation_type", "use_abs_pos_emb", "use_checkpoint", "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
))
# Of both heads. `num_convs` and `concat_input` are the auxiliary head's, and in its tensors.
_HEAD_USED = frozenset((
    "act_cfg", "conv_cfg", "dropout_ratio", "loss_decode", "norm_cfg", "pool_scales",
))
_HEAD_KEPT = frozenset((
    "channels", "concat_input", "ignore_index", "in_channels", "init_cfg", "num_classes",
    "num_convs", "sampler",
))
# fmt: on
_HEAD_ONLY: dict[str, tuple[Json, ...]] = {
    "type": ("UPerHead",),
    "align_corners": (False,),
    "in_index": ([0, 1, 2, 3],),
    "input_transform": ("multiple_select",),
}
_AUXILIARY_ONLY: dict[str, tuple[Json, ...]] = {
    "type": ("FCNHead",),
    "align_corners": (False,),
    "in_index": (2,),
    "input_transform": (None,),
    "kernel_size": (3,),
    "dilation": (1,),
}
# What a convolution's module consists of: its layers' settings, and those that change nothing.
_LAYERS: dict[str, tuple[dict[str, tuple[Json, ...]], frozenset[str]]] = {
    "act_cfg": ({"type": ("ReLU",)}, frozenset(("inplace",))),
    "conv_cfg": ({"type": ("Conv2d", "Conv")}, frozenset()),
    "norm_cfg": (
        {
            "type": ("SyncBN", "BN", "BN2d"),
            "eps": (1e-5,),
            "affine": (True,),
            "track_running_stats": (True,),
        },
        frozenset(("momentum", "requires_grad")),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What a file says of its model; a value is None, () or "" where it does not say.

    Attributes:
      blocks: whose outputs are read, from 1.
      heads: attention heads; 0 where it does not say.
      patch_size: pixels; 0 where it does not say.
      pool_scales: sizes of the pooled maps.
      dropout: before the classifiers.
      auxiliary_weight: of the auxiliary loss.
      normalization: a key of `NORMALIZATIONS`.
      labels: names of the classes.
      palette: a colour for each class, [r, g, b] of 0..255.
      is_beit: whether it names the official backbone.
    """

    blocks: tuple[int, ...] | None = None
    heads: int = 0
    patch_size: int = 0
    pool_scales: tuple[int, ...] | None = None
    dropout: float | None = None
    auxiliary_weight: float | None = None
    normalization: str = ""
    labels: tuple[str, ...] = ()
    palette: tuple[tuple[int, ...], ...] = ()
    is_beit: bool = False


def read_meta(meta: Json, *, source: str, normalization: str = "") -> Said:
    """Reads the `meta` of a checkpoint.

    Args:
      meta: as it is in the file; anything.
      source: the file, for messages.
      normalization: of the pixels, in place of what the config says; "" takes that.

    Raises:
      WeightsError: its config is of another function, or has an impossible value.
    """
    if not isinstance(meta, dict):
        return Said()
    said = Said(labels=_labels(meta.get("CLASSES")), palette=_palette(meta.get("PALETTE")))
    text = meta.get("config")
    settings = python_settings(text) if isinstance(text, str) else {}
    source = f"{source}: meta.config"
    model = _section(settings, "model")
    if not model:
        return said
    backbone, head, auxiliary = _checked_sections(model, source=source)
    is_official = backbone.get("type") in ("BEiT", "BEiTv2")
    indices = backbone.get("out_indices") or (_OFFICIAL_OUT_INDICES if is_official else None)
    return dataclasses.replace(
        said,
        blocks=None if indices is None else tuple(i + 1 for i in _integers(indices, source)),
        heads=fields.integer(backbone, "num_heads", default=0, source=source, least=0),
        patch_size=fields.integer(backbone, "patch_size", default=0, source=source, least=0),
        pool_scales=_integers(head["pool_scales"], source) if head.get("pool_scales") else None,
        dropout=_number(head, "dropout_ratio", source=source, most=0.999),
        auxiliary_weight=_number(
            _section(auxiliary, "loss_decode"), "loss_weight", source=source, most=1000
        ),
        normalization=_normalization(settings, stated=normalization, source=source),
        is_beit=is_official,
    )


def _checked_sections(
    model: JsonObject, *, source: str
) -> tuple[JsonObject, JsonObject, JsonObject]:
    """The settings of the backbone and of both heads; WeightsError for another function's."""
    fields.check_fields(
        model, used=_MODEL_USED, only=_MODEL_ONLY, kept=_MODEL_KEPT, source=f"{source}: model"
    )
    backbone, head, auxiliary = (
        fields.section(model, name, source=source)
        for name in ("backbone", "decode_head", "auxiliary_head")
    )
    fields.check_fields(
        backbone,
        used=_BACKBONE_USED,
        only=_BACKBONE_ONLY,
        kept=_BACKBONE_KEPT,
        source=f"{source}: backbone",
    )
    for name, settings, only in (
        ("decode_head", head, _HEAD_ONLY),
        ("auxiliary_head", auxiliary, _AUXILIARY_ONLY),
    ):
        fields.check_fields(
            settings, used=_HEAD_USED, only=only, kept=_HEAD_KEPT, source=f"{source}: {name}"
        )
        _check_layers(settings, source=f"{source}: {name}")
    if auxiliary.get("type") == "FCNHead" and auxiliary.get("in_index") is None:
        raise WeightsError(
            f"{source}: auxiliary_head has no in_index, which is mmseg's -1; this project's models"
            " have 2"
        )
    return backbone, head, auxiliary


def _check_layers(head: JsonObject, *, source: str) -> None:
    """Raises WeightsError for convolutions, norms or activations that are others here."""
    if "act_cfg" in head and head["act_cfg"] is None:  # of the others None is mmseg's default
        raise WeightsError(f"{source}: act_cfg is None; this project's models have ReLU")
    for name, (only, kept) in _LAYERS.items():
        layer = fields.section(head, name, source=source)
        fields.check_fields(layer, used=(), only=only, kept=kept, source=f"{source}: {name}")


def python_settings(text: str) -> JsonObject:
    """The plain values that a Python file assigns to names; {} where it is none."""
    if len(text) > _LONGEST:
        return {}
    try:
        lines = ast.parse(text).body
        return {
            line.targets[0].id: _value(line.value)
            for line in lines
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr) -> Json:
    """What a literal stands for; of another expression its text, which no setting takes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg or "**": _value(word.value) for word in node.keywords}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand)
        if isinstance(inner, int | float):
            return -inner
    return ast.unparse(node)


def _key(node: ast.expr | None) -> str:
    """A key of a dict; "**" where another dict is taken in."""
    if node is None:
        return "**"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node)


def _section(settings: JsonObject, name: str) -> JsonObject:
    value = settings.get(name)
    return value if isinstance(value, dict) else {}


def _check(settings: JsonObject, name: str, good: tuple[Json, ...], *, source: str) -> None:
    value = settings.get(name)
    if value is not None and value not in good:
        raise WeightsError(
            f"{source}: {name} is {quoted(value)}; this project's models have"
            f" {' or '.join(quoted(one) for one in good)}"
        )


def _integers(value: Json, source: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item <= 1000 for item in items):
        raise WeightsError(f"{source}: {quoted(value)} is no list of whole numbers up to 1000")
    return tuple(items)


def _number(settings: JsonObject, name: str, *, source: str, most: float) -> float | None:
    if settings.get(name) is None:
        return None
    return fields.number(settings, name, default=0, source=source, least=0, most=most)


def _normalization(settings: JsonObject, *, stated: str, source: str) -> str:
    """The name of `img_norm_cfg`, whose numbers are of pixels from 0 to 255, unless it is stated.

    mmcv repeats it in each pipeline, and the one that images pass in tests is what counts. "" where
    there is none.
    """
    steps: list[JsonObject] = []
    test = _section(_section(settings, "data"), "test").get("pipeline")
    for pipeline in (test, settings.get("test_pipeline")):
        steps += _normalizing_steps(pipeline)
    steps.append(_section(settings, "img_norm_cfg"))
    found = next((step for step in steps if "mean" in step or "std" in step), None)
    if found is None:
        return stated
    _check(found, "to_rgb", (True,), source=source)
    if stated:
        return stated
    try:
        numbers = np.array([found["mean"], found["std"]], np.float64) / 255
    except (KeyError, ValueError, TypeError):
        numbers = np.zeros(0)
    for name, values in NORMALIZATIONS.items():
        if numbers.shape == (2, 3) and np.allclose(numbers, values, atol=1e-4):
            return name
    shown = {name: found.get(name) for name in ("mean", "std")}
    raise WeightsError(
        f"{source}: img_norm_cfg is {quoted(shown)}, none of {', '.join(NORMALIZATIONS)}; say which"
        " to take: --normalization"
    )


def _normalizing_steps(pipeline: Json) -> list[JsonObject]:
    """The steps of a pipeline that normalise, also those inside of another step."""
    found: list[JsonObject] = []
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, dict):
            if step.get("type") == "Normalize":
                found.append(step)
            found += _normalizing_steps(step.get("transforms"))
    return found


def _labels(value: Json) -> tuple[str, ...]:
    is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return tuple(value) if is_names else ()


def _palette(value: Json) -> tuple[tuple[int, ...], ...]:
    def is_color(item: Json) -> bool:
        return (
            isinstance(item, list)
            and len(item) == 3
            and all(type(part) is int and 0 <= part <= 255 for part in item)
        )

    is_one = isinstance(value, list) and len(value) <= 256 and all(map(is_color, value))
    return tuple(tuple(color) for color in value) if is_one else ()
