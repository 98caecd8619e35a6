"""Hugging Face's `config.json` and `preprocessor_config.json`: read, checked, and written.

Which fields there are, and what becomes of each, is in `hugging_face_fields`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from beit_jax.config import ModelConfig
from beit_jax.config.facts import value_of
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description
from beit_jax.weights.formats import fields
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.formats.format import Stated
from beit_jax.weights.formats.hugging_face_fields import KEPT, ONLY, USED, WRITTEN_BACK
from beit_jax.weights.formats.official import OFFICIAL_EPSILON
from beit_jax.weights.formats.view import INTERPOLATIONS, View, kept_of, view_of
from beit_jax.weights.report import WeightsError

# architectures → `Description.task`; with model_type data2vec-vision the same under other names.
TASKS = {
    "BeitForMaskedImageModeling": "pretrain",
    "BeitForImageClassification": "classify",
    "BeitModel": "encoder",
    "BeitBackbone": "encoder",
    "BeitForSemanticSegmentation": "segment",
    "Data2VecVisionForImageClassification": "classify",
    "Data2VecVisionModel": "encoder",
}
CLASSES = {
    "pretrain": "BeitForMaskedImageModeling",
    "classify": "BeitForImageClassification",
    "encoder": "BeitModel",
}
MODEL_TYPES = ("beit", "data2vec-vision")

# Published configs have 1e-12; the official models were trained with 1e-6.
_PUBLISHED_EPSILON = 1e-12
# Formats whose files say how an image becomes the input.
_WITH_PREPROCESSOR = ("hugging_face", "hugging_face_beit", "timm")
# Pillow's numbers of its filters.
_RESAMPLE = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a `config.json` says.

    Attributes:
      model: the encoder.
      task: of `Description`; "" where `architectures` is not there.
      backbone: whether it is a BeitBackbone, whose tokens no norm ends.
      mean_pooling: whether the mean of the patches is pooled, not the class token.
      vocabulary: `vocab_size`.
      epsilon_guess: why the encoder's epsilon is not that of the config; "" where it is.
      kept: fields that an export writes back.
    """

    model: ModelConfig
    task: str
    backbone: bool
    mean_pooling: bool
    vocabulary: int
    epsilon_guess: str
    kept: JsonObject


def read_config(config: JsonObject, *, stated: Stated, source: str) -> Config:
    """Reads `config.json`.

    Args:
      config: its content.
      stated: the caller's own facts.
      source: for messages.

    Raises:
      WeightsError: it is another model's, or a field is unknown, wrong, or of another function.
    """
    _check_model_type(config, source=source)
    source = f"{source}: config.json"
    fields.check_fields(config, used=USED, only=ONLY, kept=KEPT, source=source)
    task = _task(config, source=source)
    mean_pooling = fields.flag(config, "use_mean_pooling", default=True, source=source)
    epsilon, guess = _epsilon(config, stated=stated, source=source)
    written = {name: value for name, value in config.items() if name in WRITTEN_BACK}
    if "layer_norm_eps" in config and not stated.layer_norm_epsilon:
        written["layer_norm_eps"] = config["layer_norm_eps"]
    return Config(
        model=_model_config(config, epsilon=epsilon, source=source),
        task=task,
        backbone=config.get("architectures") == ["BeitBackbone"],
        mean_pooling=mean_pooling,
        vocabulary=fields.integer(config, "vocab_size", default=8192, source=source),
        epsilon_guess=guess,
        kept=written,
    )


def _check_model_type(config: JsonObject, *, source: str) -> None:
    found = config.get("model_type")
    if found not in MODEL_TYPES:
        raise WeightsError(f"{source}: config.json describes a {quoted(found)}, not a BEiT")


def _task(config: JsonObject, *, source: str) -> str:
    names = config.get("architectures")
    if names is None or names == []:
        return ""
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]
    if isinstance(name, str) and name.endswith("ForSemanticSegmentation"):
        raise WeightsError(f"{source}: {name} is a segmentation model, which is not read")
    raise WeightsError(f"{source}: architectures is {quoted(names)}, none of {', '.join(TASKS)}")


def _positions(config: JsonObject, *, source: str) -> str:
    found = [
        name
        for field, name in (
            ("use_absolute_position_embeddings", "absolute"),
            ("use_shared_relative_position_bias", "relative_shared"),
            ("use_relative_position_bias", "relative_per_block"),
        )
        if fields.flag(config, field, default=False, source=source)
    ]
    if len(found) != 1:
        what = " and ".join(found) or "none"
        raise WeightsError(
            f"{source}: positions are {what}; this project's models have one kind of them"
        )
    return found[0]


def _epsilon(config: JsonObject, *, stated: Stated, source: str) -> tuple[float, str]:
    """The LayerNorms' epsilon, and why it is not the config's, where it is not."""
    found = fields.number(
        config, "layer_norm_eps", default=_PUBLISHED_EPSILON, source=source, least=0, most=1
    )
    if stated.layer_norm_epsilon is not None:
        return stated.layer_norm_epsilon, ""
    if found != _PUBLISHED_EPSILON:
        return found, ""
    return OFFICIAL_EPSILON, (
        f"{OFFICIAL_EPSILON:g} in place of config.json's {found:g}, which published BEiTs have"
        f" there although they were trained with the former; --epsilon {found:g} keeps it"
    )


def _model_config(config: JsonObject, *, epsilon: float, source: str) -> ModelConfig:
    def whole(name: str, default: int) -> int:
        return fields.integer(config, name, default=default, source=source)

    scale = config.get("layer_scale_init_value", 0.1)
    if scale is not None:
        scale = fields.number(
            config, "layer_scale_init_value", default=0.1, source=source, least=-1e6, most=1e6
        )
    drop_path = fields.number(
        config, "drop_path_rate", default=0.1, source=source, least=0, most=0.999
    )
    try:
        model = ModelConfig(
            layers=whole("num_hidden_layers", 12),
            width=whole("hidden_size", 768),
            heads=whole("num_attention_heads", 12),
            mlp_width=whole("intermediate_size", 3072),
            image_size=fields.side(config, "image_size", default=224, source=source),
            patch_size=fields.side(config, "patch_size", default=16, source=source),
            positions=_positions(config, source=source),
            # As transformers: no LayerScale where the value is not above 0.
            layer_scale_init=scale if scale and scale > 0 else None,
            drop_path_rate=drop_path,
            layer_norm_epsilon=epsilon,
        )
    except WeightsError:
        raise
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: {error}") from None
    head = config.get("head_dim")
    if head is not None and head != model.width // model.heads:
        raise WeightsError(
            f"{source}: head_dim is {quoted(head)}; this project's heads are"
            f" {model.width // model.heads} wide here"
        )
    return model


def read_labels(config: JsonObject, *, classes: int, source: str) -> tuple[str, ...]:
    """Names of the classes from `id2label`, "" for none; () where there are none or too few.

    Raises:
      WeightsError: it is no object from 0, 1, ... to names.
    """
    source = f"{source}: config.json"
    names = fields.section(config, "id2label", source=source)
    wrong = next((key for key in names if not str(key).isdecimal() or not str(key).isascii()), None)
    if wrong is not None:
        raise WeightsError(f"{source}: id2label has the key {quoted(wrong)}, not a class number")
    return fields.numbered(names, count=classes)


def read_preprocessor(
    preprocessor: JsonObject, *, stated: Stated, image_size: int, source: str
) -> tuple[str, View]:
    """The normalisation and the view that `preprocessor_config.json` asks for.

    Returns:
      A key of `NORMALIZATIONS`, and the view. The key is "" where the file has another
      normalisation and `stated` names one in its place.

    Raises:
      WeightsError: a wrong value, or another normalisation and `stated` names none.
    """
    source = f"{source}: preprocessor_config.json"
    if fields.flag(preprocessor, "do_flip_channel_order", default=False, source=source):
        raise WeightsError(
            f"{source}: do_flip_channel_order is true; this project's images are RGB"
        )
    try:
        name = _normalization(preprocessor, source=source)
    except WeightsError:
        if not stated.normalization:
            raise
        name = ""
    kind = str(preprocessor.get("image_processor_type", preprocessor.get("feature_extractor_type")))
    resample = preprocessor.get("resample")
    if resample is None:
        resample = 2 if kind.startswith(("ViT", "Segformer")) else 3  # their defaults
    known = isinstance(resample, int) and not isinstance(resample, bool) and resample in _RESAMPLE
    if not known:
        raise WeightsError(f"{source}: resample is {quoted(resample)}, none of Pillow's filters")
    size = _lengths(preprocessor, "size", default=image_size, source=source)
    crop = 1.0
    if fields.flag(preprocessor, "do_center_crop", default=False, source=source):
        window = _lengths(preprocessor, "crop_size", default=image_size, source=source)
        crop = min(1.0, min(window.values()) / min(size.values()))
    elif preprocessor.get("crop_pct") is not None:  # ConvNextImageProcessor
        crop = fields.number(preprocessor, "crop_pct", default=1, source=source, least=0.01, most=1)
    squash = "shortest_edge" not in size
    return name, View(interpolation=_RESAMPLE[resample], crop=crop, squash=squash)


def _lengths(preprocessor: JsonObject, name: str, *, default: int, source: str) -> dict[str, int]:
    """`size` or `crop_size`: {"height", "width"}, {"shortest_edge"} or one number."""
    value = preprocessor.get(name)
    if value is None:
        value = default
    if isinstance(value, list):
        value = dict(zip(("height", "width"), value, strict=False))
    if not isinstance(value, dict):
        value = {"height": value, "width": value}
    value = {key: length for key, length in value.items() if length is not None}
    if not value:
        raise WeightsError(f"{source}: {name} is empty")
    return {key: fields.integer(value, key, default=default, source=source) for key in value}


def _normalization(preprocessor: JsonObject, *, source: str) -> str:
    """The name of the normalisation of [0, 1] pixels, rescaling and shifting taken together."""
    rescale = fields.flag(preprocessor, "do_rescale", default=True, source=source)
    factor = fields.number(
        preprocessor, "rescale_factor", default=1 / 255, source=source, least=1e-9, most=1e9
    )
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if not fields.flag(preprocessor, "do_normalize", default=True, source=source):
        mean, std = (0.0,) * 3, (1.0,) * 3
    elif None not in (preprocessor.get("image_mean"), preprocessor.get("image_std")):
        mean = fields.numbers(preprocessor, "image_mean", count=3, source=source)
        std = fields.numbers(preprocessor, "image_std", count=3, source=source)
    elif preprocessor.get("image_mean") is preprocessor.get("image_std") is None:
        # The defaults of SegformerImageProcessor, which UperNets come with, and BeitImageProcessor.
        kind = str(preprocessor.get("image_processor_type"))
        mean, std = NORMALIZATIONS["imagenet" if kind.startswith("Segformer") else "half"]
    else:
        raise WeightsError(f"{source}: has image_mean or image_std, but not both")
    # Without rescaling, pixels are either in [0, 1] when they come, or in [0, 255].
    for scale in (255 * factor,) if rescale else (1.0, 255.0):
        for name, values in NORMALIZATIONS.items():
            if np.allclose(np.array([mean, std]) / scale, values, atol=1e-6):
                return name
    found = {
        name: preprocessor[name]
        for name in ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor")
        if name in preprocessor
    }
    raise WeightsError(
        f"{source}: {quoted(found)} has a mean and deviation that are none of"
        f" {', '.join(NORMALIZATIONS)}; say which to take: --normalization"
    )


def config_json(description: Description, *, kept: JsonObject) -> JsonObject:
    """`config.json`: what transformers builds the model from.

    Args:
      description: the model.
      kept: `Config.kept` of the file that it was imported from.
    """
    model = description.model
    config: JsonObject = {
        "architectures": [CLASSES[description.task]],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": model.drop_path_rate,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.width,
        "image_size": model.image_size,
        "initializer_range": 0.02,
        "intermediate_size": model.mlp_width,
        # Published configs say 1e-12 where the official code has 1e-6; the value here is true.
        "layer_norm_eps": model.layer_norm_epsilon,
        "layer_scale_init_value": model.layer_scale_init or 0.0,
        "model_type": "beit",
        "num_attention_heads": model.heads,
        "num_channels": 3,
        "num_hidden_layers": model.layers,
        "patch_size": model.patch_size,
        "torch_dtype": "float32",
        "use_absolute_position_embeddings": model.positions == "absolute",
        "use_mask_token": description.task == "pretrain" or description.mask_token,
        "use_mean_pooling": description.task == "pretrain" or description.pooling != "cls",
        "use_relative_position_bias": model.positions == "relative_per_block",
        "use_shared_relative_position_bias": model.positions == "relative_shared",
        "vocab_size": description.outputs if description.task == "pretrain" else 8192,
    }
    if description.task == "classify":
        config |= labels_json(description)
    return config | _written_back(description, kept)


def labels_json(description: Description) -> JsonObject:
    """The fields of `config.json` for a head's classes."""
    labels = description.labels or [f"LABEL_{i}" for i in range(description.outputs)]
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_labels": description.outputs,
    }


def _written_back(description: Description, kept: JsonObject) -> JsonObject:
    fields_ = {name: value for name, value in kept.items() if name in WRITTEN_BACK}
    published = kept.get("layer_norm_eps") == _PUBLISHED_EPSILON
    if published and description.model.layer_norm_epsilon == OFFICIAL_EPSILON:
        fields_["layer_norm_eps"] = _PUBLISHED_EPSILON
    return fields_


def preprocessor_json(description: Description, *, config: JsonObject) -> JsonObject:
    """`preprocessor_config.json`: as the imported file had it, else straight to the model's size.

    Args:
      description: the model.
      config: saved with the checkpoint.
    """
    mean, std = NORMALIZATIONS[description.normalization]
    side = description.model.image_size
    size = {"height": side, "width": side}
    result: JsonObject = {
        "image_processor_type": "BeitImageProcessor",
        "crop_size": size,
        "do_center_crop": False,
        "do_normalize": True,
        # Whether label 0 is no class, of a segmentation model's data.
        "do_reduce_labels": value_of(config, "data.zero_is_background") is True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": INTERPOLATION_NUMBERS["bicubic"],
        "rescale_factor": 1 / 255,
        "size": size,
    }
    kept = kept_of(config)
    if kept.get("format") not in _WITH_PREPROCESSOR:  # this project's own: nothing is kept
        return result
    view = view_of(config, image_size=side)
    result["resample"] = INTERPOLATION_NUMBERS[view.interpolation]
    if view.crop < 1:
        larger = int(side / view.crop + 1e-6)  # timm rounds down
        result |= {"do_center_crop": True, "size": {"height": larger, "width": larger}}
    same_size = kept.get("image_size") == side
    same_pixels = kept.get("normalization") == description.normalization
    original = dict(kept.get("preprocessor", {}))
    if not same_size:
        original |= _scaled(original, side=side, before=kept.get("image_size", side))
    if not same_pixels:
        pixels = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")
        original = {k: v for k, v in original.items() if k not in pixels}
    return result | original


def _scaled(original: JsonObject, *, side: int, before: int) -> JsonObject:
    """`size` and `crop_size` for another size of the model's input, in their own form."""

    def scale(value: Json) -> Json:
        if isinstance(value, dict):
            return {key: scale(item) for key, item in value.items()}
        if isinstance(value, list):
            return [scale(item) for item in value]
        return round(value * side / before) if isinstance(value, int) else value

    return {name: scale(original[name]) for name in ("size", "crop_size") if name in original}


INTERPOLATION_NUMBERS: Mapping[str, int] = {name: number for number, name in _RESAMPLE.items()}
assert set(INTERPOLATION_NUMBERS) == set(INTERPOLATIONS)
