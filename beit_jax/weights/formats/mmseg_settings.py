"""What OpenMMLab's checkpoints say beside their tensors: class names, and the config as text.

`meta["config"]` is a Python file of assignments, as mmcv prints it. It is parsed and never run:
names, numbers, lists and calls of `dict` are read, and anything else is None.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What a file says of its model; a value is None, () or "" where it does not say.

    Attributes:
      blocks: whose outputs are read, from 1.
      heads: attention heads; 0 where it does not say.
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
    pool_scales: tuple[int, ...] | None = None
    dropout: float | None = None
    auxiliary_weight: float | None = None
    normalization: str = ""
    labels: tuple[str, ...] = ()
    palette: tuple[tuple[int, ...], ...] = ()
    is_beit: bool = False


def read_meta(meta: Json, *, source: str) -> Said:
    """Reads the `meta` of a checkpoint.

    Args:
      meta: as it is in the file; anything.
      source: the file, for messages.

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
    backbone, head = _section(model, "backbone"), _section(model, "decode_head")
    auxiliary = _section(model, "auxiliary_head")
    _check(backbone, "type", ("BEiT", "BEiTv2"), source=source)
    _check(backbone, "patch_size", (16,), source=source)
    _check(head, "type", ("UPerHead",), source=source)
    _check(head, "align_corners", (False,), source=source)
    _check(head, "in_index", ([0, 1, 2, 3],), source=source)
    _check(auxiliary, "type", ("FCNHead",), source=source)
    _check(auxiliary, "align_corners", (False,), source=source)
    _check(auxiliary, "in_index", (2,), source=source)
    _check(auxiliary, "kernel_size", (3,), source=source)
    is_official = backbone.get("type") in ("BEiT", "BEiTv2")
    indices = backbone.get("out_indices") or (_OFFICIAL_OUT_INDICES if is_official else None)
    return dataclasses.replace(
        said,
        blocks=None if indices is None else tuple(i + 1 for i in _integers(indices, source)),
        heads=fields.integer(backbone, "num_heads", default=0, source=source, least=0),
        pool_scales=_integers(head["pool_scales"], source) if head.get("pool_scales") else None,
        dropout=_number(head, "dropout_ratio", source=source, most=0.999),
        auxiliary_weight=_number(
            _section(auxiliary, "loss_decode"), "loss_weight", source=source, most=1000
        ),
        normalization=_normalization(settings, source=source),
        is_beit=is_official,
    )


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
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str | int | float) else None
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            key.value: _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand)
        return -inner if isinstance(inner, int | float) else None
    return None


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


def _normalization(settings: JsonObject, *, source: str) -> str:
    """The name of `img_norm_cfg`, whose numbers are of pixels from 0 to 255."""
    found = _section(settings, "img_norm_cfg")
    if not found:
        return ""
    _check(found, "to_rgb", (True,), source=source)
    try:
        numbers = np.array([found["mean"], found["std"]], np.float64) / 255
    except (KeyError, ValueError, TypeError):
        return ""
    names = [
        name
        for name, values in NORMALIZATIONS.items()
        if numbers.shape == (2, 3) and np.allclose(numbers, values, atol=1e-4)
    ]
    return names[0] if names else ""


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
