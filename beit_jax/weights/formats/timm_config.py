"""timm's facts: architecture, `model_args` and `pretrained_cfg`, read from a folder and written.

What the arguments mean is in `timm_arguments`.
"""

import dataclasses
from collections.abc import Mapping

from beit_jax.json_text import JsonError, json_object
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description, normalization_of
from beit_jax.weights.formats import fields, official, timm_arguments
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.formats.format import Opened, Stated
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
# What create_model gives a model of these names unless it is told otherwise (models/beit.py).
_DEFAULT_CROP = {224: 0.9, 384: 1.0, 512: 1.0}
_LARGE_V2_CROP = 0.95


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
    if not timm_arguments.is_beit(name, source=source):
        raise WeightsError(f"{source}: its architecture is {quoted(name)}, not a BEiT")
    arguments = fields.section(config, "model_args", source=source)
    settings = fields.section(config, "pretrained_cfg", source=source) or config
    if arguments.get("img_size") is None:
        _check_square(settings, source=source)
    said = timm_arguments.known(
        arguments,
        name=name,
        pool=config.get("global_pool"),
        state=opened.state,
        source=f"{source}: model_args",
    )
    labels, notes = _labels(config, source=source)
    return dataclasses.replace(
        said,
        layer_norm_epsilon=official.OFFICIAL_EPSILON,
        normalization=stated.normalization or _normalization(settings, source=source),
        labels=labels,
        notes=notes,
        kept={
            "format": "timm",
            "architecture": name,
            "pretrained_cfg": settings if settings is not config else {},
            "view": dataclasses.asdict(_view(settings, source=source)),
        },
    )


def _check_square(settings: JsonObject, *, source: str) -> None:
    size = settings.get("input_size")
    if isinstance(size, list) and len(size) == 3 and size[1] != size[2]:
        raise WeightsError(
            f"{source}: input_size is {quoted(size)}; this project's models take squares"
        )


def _known_by_header(opened: Opened) -> Known:
    """The header of a file that an older version of this project wrote; others are ignored.

    Raises WeightsError where it is one, with values that are none.
    """
    try:
        arguments = json_object(opened.metadata.get("timm", "{}"), path="timm")["arguments"]
        heads = arguments.get("num_heads", 0)
    except (JsonError, KeyError, AttributeError):
        return Known()
    source = f"{opened.path}: the header"
    name = opened.metadata.get("normalization", "")
    if name and name not in NORMALIZATIONS:
        raise WeightsError(f"{source}: normalization is {quoted(name)}, not known")
    if heads:
        heads = fields.integer(arguments, "num_heads", default=0, source=f"{source}: timm")
    return Known(beit=True, heads=heads, normalization=name)


def _normalization(settings: JsonObject, *, source: str) -> str:
    mean, std = settings.get("mean"), settings.get("std")
    if mean is std is None:
        return ""
    if mean is None or std is None:
        raise WeightsError(f"{source}: has a mean or a std, but not both")
    mean, std = (fields.numbers(settings, name, count=3, source=source) for name in ("mean", "std"))
    return normalization_of(mean, std, source=source)


def _view(settings: JsonObject, *, source: str) -> View:
    interpolation = settings.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise WeightsError(f"{source}: interpolation is {quoted(interpolation)}, not known")
    mode = settings.get("crop_mode", "center")
    if mode not in ("center", "squash", "border", None):
        raise WeightsError(f"{source}: crop_mode is {quoted(mode)}, not known")
    crop = fields.number(settings, "crop_pct", default=0.875, source=source, least=0.01, most=1)
    return View(interpolation=interpolation, crop=crop, squash=mode == "squash")


def _labels(config: JsonObject, *, source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`label_names`, a list or an object by class number; and what to say of them."""
    settings = fields.section(config, "pretrained_cfg", source=source)
    names = config.get("label_names")
    names = settings.get("label_names") if names is None else names
    if names is None:
        return (), ()
    if isinstance(names, dict):
        labels = fields.numbered(names, count=len(names))
        notes = () if labels else ("labels left out: label_names has gaps, or no class numbers",)
        return labels, notes
    if not isinstance(names, list | tuple):
        raise WeightsError(f"{source}: label_names is no list and no object by class number")
    return tuple(str(name) for name in names), ()


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
