"""timm's facts: architecture, `model_args` and `pretrained_cfg`, read from a folder and written.

As for Hugging Face, every argument of a model is in one of three tables: read (`USED`), refused
unless it leaves the function as it is (`ONLY`), or known to act in training alone (`KEPT`).
"""

import dataclasses
import json
from collections.abc import Mapping

from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description, normalization_of
from beit_jax.weights.formats import fields, official
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.formats.format import Opened, State, Stated
from beit_jax.weights.formats.official import Known
from beit_jax.weights.formats.view import INTERPOLATIONS, View, kept_of, view_of
from beit_jax.weights.report import WeightsError

# (layers, width, heads, mlp_width) → size in timm's names.
_SIZES = {(12, 768, 12, 3072): "base", (24, 1024, 16, 4096): "large"}
_NAMES = {
    ("base", 224): "beit_base_patch16_224",
    ("base", 384): "beit_base_patch16_384",
    ("large", 224): "beit_large_patch16_224",
    ("large", 384): "beit_large_patch16_384",
    ("large", 512): "beit_large_patch16_512",
}
# BEiT v2 has v1's architecture; its names stand for ImageNet's mean and deviation.
_NAMES_V2 = {("base", 224): "beitv2_base_patch16_224", ("large", 224): "beitv2_large_patch16_224"}
_HEADS = {"base": 12, "large": 16}
# What create_model gives a model of these names unless it is told otherwise (models/beit.py).
_DEFAULT_CROP = {224: 0.9, 384: 1.0, 512: 1.0}
_LARGE_V2_CROP = 0.95

# fmt: off
USED = frozenset((
    "num_heads", "global_pool", "use_fc_norm", "img_size", "patch_size", "embed_dim", "depth",
    "mlp_ratio", "num_classes", "use_abs_pos_emb", "use_rel_pos_bias",
    "use_shared_rel_pos_bias", "init_values",
))
# fmt: on
ONLY: dict[str, tuple[Json, ...]] = {
    "in_chans": (3, None),
    "qkv_bias": (True, None),
    "swiglu_mlp": (False, None),
    "scale_mlp": (False, None),
    "norm_layer": (None,),
    "act_layer": (None,),
}
# fmt: off
KEPT = frozenset((
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "head_init_scale", "drop_block_rate",
))
# fmt: on


def known(opened: Opened, *, stated: Stated) -> Known:
    """What timm's `config.json` beside the weights says, or the header of a file written here.

    Args:
      opened: the file.
      stated: the caller's own facts.

    Raises:
      WeightsError: the architecture is not a BEiT, or a field is unknown, wrong, or of another
        function.
    """
    config = opened.config
    if not config:
        return _known_by_header(opened)
    source = f"{opened.path}: config.json"
    name = config.get("architecture")
    if not isinstance(name, str):
        raise WeightsError(f"{source} names no architecture")
    official.check_architecture(name, source=source)
    arguments = fields.section(config, "model_args", source=source)
    _check_arguments(arguments, config, opened.state, source=source)
    settings = fields.section(config, "pretrained_cfg", source=source) or config
    view = _view(settings, source=source)
    return Known(
        beit=True,
        heads=_stated_heads(arguments, opened.state, name=name, source=source),
        layer_norm_epsilon=official.OFFICIAL_EPSILON,
        normalization=stated.normalization or _normalization(settings, source=source),
        labels=_labels(config, source=source),
        kept={
            "format": "timm",
            "architecture": name,
            "pretrained_cfg": settings if settings is not config else {},
            "view": dataclasses.asdict(view),
        },
    )


def _known_by_header(opened: Opened) -> Known:
    """The header of a file that an older version of this project wrote; others are ignored.

    Raises WeightsError where it is one, with values that are none.
    """
    try:
        arguments = json.loads(opened.metadata.get("timm", "{}"))["arguments"]
        heads = arguments.get("num_heads", 0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Known()
    source = f"{opened.path}: the header"
    name = opened.metadata.get("normalization", "")
    if name and name not in NORMALIZATIONS:
        raise WeightsError(f"{source}: normalization is {quoted(name)}, not known")
    if heads:
        heads = fields.integer(arguments, "num_heads", default=0, source=f"{source}: timm")
    return Known(beit=True, heads=heads, normalization=name)


def _check_arguments(
    arguments: JsonObject, config: JsonObject, state: State, *, source: str
) -> None:
    fields.check_fields(arguments, used=USED, only=ONLY, kept=KEPT, source=f"{source}: model_args")
    pool = arguments.get("global_pool", config.get("global_pool", "avg"))
    if pool not in ("avg", "token", ""):
        raise WeightsError(f"{source}: global_pool is {quoted(pool)}, none of avg, token")
    if "head.weight" in state and pool == "":
        raise WeightsError(
            f"{source}: global_pool is '': its classifier gives logits of every token, which this"
            " project's do not"
        )
    mean_of_patches = "fc_norm.weight" in state
    if "head.weight" in state and (pool == "avg") != mean_of_patches:
        norm = "fc_norm" if mean_of_patches else "norm"
        raise WeightsError(
            f"{source}: global_pool {quoted(pool)} with the norm {norm!r}: this project's"
            " classifiers pool the mean before their norm, or the class token after it"
        )


def check_sizes(opened: Opened, description: Description) -> None:
    """Raises WeightsError where `model_args` are of another model than the tensors make."""
    source = f"{opened.path}: config.json"
    arguments = fields.section(opened.config, "model_args", source=source)
    source = f"{source}: model_args"
    model = description.model
    for name, ours in (
        ("img_size", model.image_size),
        ("patch_size", model.patch_size),
        ("embed_dim", model.width),
        ("depth", model.layers),
        ("num_heads", model.heads),
    ):
        if arguments.get(name) is not None:
            _same(name, fields.side(arguments, name, default=ours, source=source), ours, source)
    if arguments.get("mlp_ratio") is not None:
        ratio = fields.number(
            arguments, "mlp_ratio", default=4, source=source, least=0.001, most=1000
        )
        _same("embed_dim * mlp_ratio", int(model.width * ratio), model.mlp_width, source)
    if "init_values" in arguments:
        scaled = bool(arguments["init_values"])
        _same("init_values", scaled, model.layer_scale_init is not None, source)
    for name, holds in (
        ("use_abs_pos_emb", model.positions == "absolute"),
        ("use_rel_pos_bias", model.positions == "relative_per_block"),
        ("use_shared_rel_pos_bias", model.positions == "relative_shared"),
        ("use_fc_norm", description.pooling == "mean"),
    ):
        _same(name, fields.flag(arguments, name, default=holds, source=source), holds, source)


def _same(name: str, stated: int, ours: int, source: str) -> None:
    if stated != ours:
        raise WeightsError(f"{source}: {name} is {stated}, but by the tensors it is {ours}")


def _stated_heads(arguments: JsonObject, state: State, *, name: str, source: str) -> int:
    if "num_heads" in arguments:
        return fields.integer(arguments, "num_heads", default=0, source=f"{source}: model_args")
    token = state["cls_token"]
    for size, heads in _HEADS.items():
        if size in name and token.ndim and token.shape[-1] == 64 * heads:
            return heads
    return 0


def _normalization(settings: JsonObject, *, source: str) -> str:
    if "mean" not in settings and "std" not in settings:
        return ""
    if "mean" not in settings or "std" not in settings:
        raise WeightsError(f"{source}: has a mean or a std, but not both")
    mean, std = (fields.numbers(settings, name, count=3, source=source) for name in ("mean", "std"))
    return normalization_of(mean, std, source=source)


def _view(settings: JsonObject, *, source: str) -> View:
    interpolation = settings.get("interpolation", "bicubic")
    if interpolation not in INTERPOLATIONS:
        raise WeightsError(f"{source}: interpolation is {quoted(interpolation)}, not known")
    mode = settings.get("crop_mode", "center")
    if mode not in ("center", "squash", "border", None):
        raise WeightsError(f"{source}: crop_mode is {quoted(mode)}, not known")
    crop = fields.number(settings, "crop_pct", default=0.9, source=source, least=0.01, most=1)
    return View(interpolation=interpolation, crop=crop, squash=mode == "squash")


def _labels(config: JsonObject, *, source: str) -> tuple[str, ...]:
    """`label_names`, a list or an object by number, in a folder's config or its pretrained_cfg."""
    settings = fields.section(config, "pretrained_cfg", source=source)
    names = config.get("label_names", settings.get("label_names"))
    if names is None:
        return ()
    if isinstance(names, dict):
        try:
            return tuple(str(names[key]) for key in sorted(names, key=int))
        except ValueError:
            names = None
    if not isinstance(names, list | tuple):
        raise WeightsError(f"{source}: label_names is no list and no object by class number")
    return tuple(str(name) for name in names)


def pretrained_cfg(description: Description, *, config: JsonObject) -> JsonObject:
    """What `resolve_data_config` reads: how this checkpoint's images are made.

    Args:
      description: the model.
      config: saved with the checkpoint.
    """
    mean, std = NORMALIZATIONS[description.normalization]
    size = description.model.image_size
    view = view_of(config, image_size=size)
    result: JsonObject = {
        "num_classes": description.outputs,
        "input_size": [3, size, size],
        "interpolation": view.interpolation,
        "crop_pct": view.crop,
        "mean": list(mean),
        "std": list(std),
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if view.squash:
        result["crop_mode"] = "squash"
    kept = kept_of(config)
    if kept.get("format") == "timm":
        result = kept["pretrained_cfg"] | result
    return result


def create_model_arguments(
    description: Description, *, config: Mapping[str, Json] | None = None
) -> tuple[str, JsonObject]:
    """The name and keyword arguments of `timm.create_model` that give this model.

    Args:
      description: of a model that timm has: per-block or absolute positions, no mask token.
      config: saved with the checkpoint; None for nothing but the architecture.
    """
    model = description.model
    size = _SIZES.get((model.layers, model.width, model.heads, model.mlp_width)) or ""
    size = size if model.patch_size == 16 else ""
    names = _NAMES
    if description.normalization == "imagenet" and (size, model.image_size) in _NAMES_V2:
        names = _NAMES_V2
    name = names.get((size, model.image_size))
    arguments: JsonObject = {}
    if name is None:
        name = "beit_base_patch16_224"
        arguments |= {
            "img_size": model.image_size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.layers,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_width / model.width,
        }
    if model.positions == "absolute":
        arguments |= {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
    if model.layer_scale_init is None:
        arguments["init_values"] = 0.0  # not None: create_model leaves out what is None
    if description.task == "encoder":
        arguments["num_classes"] = 0
    elif description.outputs != 1000:
        arguments["num_classes"] = description.outputs
    if description.pooling != "mean":
        # Without mean pooling timm ends in `norm`, as this encoder does; "" returns every token.
        arguments["global_pool"] = "token" if description.task == "classify" else ""
    if config is not None:
        overlay = _overlay(name, pretrained_cfg(description, config=dict(config)))
        if overlay:
            arguments["pretrained_cfg_overlay"] = overlay
    return name, arguments


def _overlay(name: str, wanted: JsonObject) -> JsonObject:
    """Of what `resolve_data_config` reads, that which differs from the defaults of the name."""
    v2 = name.startswith("beitv2")
    size = int(name.rsplit("_", 1)[1])
    mean, std = NORMALIZATIONS["imagenet" if v2 else "half"]
    defaults: JsonObject = {
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "crop_pct": _LARGE_V2_CROP if v2 and "large" in name else _DEFAULT_CROP[size],
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
    }
    return {key: wanted[key] for key in defaults if key in wanted and wanted[key] != defaults[key]}
