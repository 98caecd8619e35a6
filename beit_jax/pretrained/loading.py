"""The loaders of models: any format, any image size."""

import dataclasses
import functools
import os
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from beit_jax.config import ModelConfig, check, parse
from beit_jax.config.facts import value_of
from beit_jax.config.segment import InferenceConfig, SegmentHeadConfig
from beit_jax.models.functional import Functional, unflatten
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.models.segmenter import segmenter
from beit_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from beit_jax.pretrained.heads import PretrainedClassifier, PretrainedMaskedImageModel
from beit_jax.pretrained.segmenter import PretrainedSegmenter
from beit_jax.types import Json, JsonObject, Params
from beit_jax.weights import convert, native, opening
from beit_jax.weights.description import Description
from beit_jax.weights.formats.format import Stated
from beit_jax.weights.report import WeightsError, check_names, log_remarks

Source: TypeAlias = str | os.PathLike[str]


def load_encoder(
    source: Source,
    *,
    image_size: int | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    normalization: str = "",
    heads: int = 0,
    layer_norm_epsilon: float | None = None,
    weights: str = "",
) -> PretrainedEncoder:
    """Loads the encoder of any checkpoint, without its head.

    Args:
      source: a run's directory or a checkpoint of this project, a Hugging Face folder, a
        `.safetensors` of timm, a `.pth` of unilm, or "hf:OWNER/NAME[@REVISION]".
      image_size: pixels of the images, for which positions are interpolated; None keeps the
        checkpoint's own size.
      dtype: of matmuls: "auto" (bfloat16 on accelerators, float32 on CPU), "float32", "bfloat16".
      attention: the implementation, as `ModelConfig.attention`.
      normalization: "half" or "imagenet", in place of what the checkpoint says. With "", the
        checkpoint decides, and "half" is taken where its format cannot say.
      heads: attention heads, for formats that don't say; 0 stands for width / 64 there.
      layer_norm_epsilon: in place of what the checkpoint says; None takes that, or the official
        1e-6 where its format cannot say.
      weights: "ema" or "model", for training checkpoints with an average beside the model; "" takes
        a foreign file's average, as timm does, and a run's model.

    Returns:
      The encoder, its parameters on the default device.

    Raises:
      ConfigError: there is no such checkpoint, it is damaged, or a setting doesn't fit it.
    """
    flat, description, _ = _read(
        source,
        image_size=image_size,
        dtype=dtype,
        attention=attention,
        stated=Stated(
            normalization=normalization,
            heads=heads,
            layer_norm_epsilon=layer_norm_epsilon,
            weights=weights,
        ),
    )
    kept = {name: array for name, array in flat.items() if name.startswith("encoder/")}
    return encoder_of(_on_device(kept)["encoder"], description)


def load_classifier(
    source: Source,
    *,
    image_size: int | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    normalization: str = "",
    heads: int = 0,
    layer_norm_epsilon: float | None = None,
    weights: str = "",
) -> PretrainedClassifier:
    """Loads a fine-tuned classifier; the arguments are those of `load_encoder`.

    Raises:
      ConfigError: as `load_encoder`, or the checkpoint has no classifier.
    """
    flat, description, _ = _read(
        source,
        image_size=image_size,
        dtype=dtype,
        attention=attention,
        stated=Stated(
            normalization=normalization,
            heads=heads,
            layer_norm_epsilon=layer_norm_epsilon,
            weights=weights,
        ),
    )
    _check_task(description, "classify", source=source)
    functions = _classifier_functions(
        description.model, classes=description.outputs, pooling=description.pooling
    )
    return PretrainedClassifier(
        params=_on_device(flat), description=description, functions=functions
    )


def load_masked_image_model(
    source: Source,
    *,
    image_size: int | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    normalization: str = "",
    heads: int = 0,
    layer_norm_epsilon: float | None = None,
    weights: str = "",
) -> PretrainedMaskedImageModel:
    """Loads a pre-trained encoder with its token head; the arguments are those of `load_encoder`.

    Raises:
      ConfigError: as `load_encoder`, or the checkpoint has no token head.
    """
    flat, description, _ = _read(
        source,
        image_size=image_size,
        dtype=dtype,
        attention=attention,
        stated=Stated(
            normalization=normalization,
            heads=heads,
            layer_norm_epsilon=layer_norm_epsilon,
            weights=weights,
        ),
    )
    _check_task(description, "pretrain", source=source)
    functions = _masked_image_model_functions(description.model, vocabulary=description.outputs)
    return PretrainedMaskedImageModel(
        params=_on_device(flat), description=description, functions=functions
    )


def load_segmenter(
    source: Source,
    *,
    image_size: int | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    normalization: str = "",
    heads: int = 0,
    layer_norm_epsilon: float | None = None,
    weights: str = "",
) -> PretrainedSegmenter:
    """Loads a segmentation model; the arguments are those of `load_encoder`.

    With another `image_size`, windows have that side, and images are resized in proportion.

    Raises:
      ConfigError: as `load_encoder`, or the checkpoint is no segmentation model.
    """
    flat, description, config = _read(
        source,
        image_size=image_size,
        dtype=dtype,
        attention=attention,
        stated=Stated(
            normalization=normalization,
            heads=heads,
            layer_norm_epsilon=layer_norm_epsilon,
            weights=weights,
        ),
    )
    _check_task(description, "segment", source=source)
    params, variables = description.split(flat)
    short_side, long_side = _sides(config, image_size=description.model.image_size)
    assert description.head is not None  # of this task
    return PretrainedSegmenter(
        params=_on_device(params),
        variables=_on_device(variables),
        description=description,
        functions=_segmenter_functions(
            description.model, head=description.head, classes=description.outputs
        ),
        inference=_inference(config, image_size=description.model.image_size),
        short_side=short_side,
        long_side=long_side,
    )


def _sides(config: JsonObject, *, image_size: int) -> tuple[int, int]:
    """To what a run resizes the shorter and the longer side at scale 1, for its size of windows.

    Args:
      config: saved with the checkpoint.
      image_size: of the model as it is loaded; sizes that were chosen for another one are scaled.
    """
    own = value_of(config, "model.image_size")
    factor = image_size / own if _is_side(own) else 1.0
    short, long = (value_of(config, f"data.{name}") for name in ("short_side", "long_side"))
    shorter = round(short * factor) if _is_side(short) else image_size
    return shorter, round(long * factor) if _is_side(long) else 4 * shorter


def _is_side(value: Json) -> bool:
    return type(value) is int and value > 0


def _inference(config: JsonObject, *, image_size: int) -> InferenceConfig:
    """How a run covers images; the official way where a checkpoint is not of a run.

    Strides that were chosen for another size of windows are scaled.
    """
    official = InferenceConfig(stride=max(1, image_size * 2 // 3))
    saved, own = config.get("inference"), value_of(config, "model.image_size")
    if not isinstance(saved, dict) or not _is_side(own):
        return official
    found = parse(InferenceConfig, saved, path="inference")
    return dataclasses.replace(found, stride=max(1, round(found.stride * image_size / own)))


def _read(
    source: Source,
    *,
    image_size: int | None,
    dtype: str,
    attention: str,
    stated: Stated,
) -> tuple[dict[str, np.ndarray], Description, JsonObject]:
    """Flat parameters of any checkpoint, resized; what they are with these settings; its config."""
    source = os.fspath(source)
    if not native.is_checkpoint(source) and not opening.is_foreign(source):
        raise WeightsError(
            f"{source} is not a checkpoint: give a run's directory, a Hugging Face folder, a"
            " .safetensors or .pth file, or hf:OWNER/NAME"
        )
    whole = isinstance(image_size, int) and not isinstance(image_size, bool)
    check(image_size is None or whole, "image_size", f"must be whole pixels, got {image_size!r}")
    params, description, config, report = convert.read_any(source, stated=stated)
    log_remarks(report, source=source)
    check_names(
        {name: leaf.shape for name, leaf in description.shapes().items()},
        {name: array.shape for name, array in params.items()},
        source=source,
    )
    params, description, _ = convert.resized(params, description, image_size=image_size)
    model = dataclasses.replace(description.model, dtype=dtype, attention=attention)
    return params, dataclasses.replace(description, model=model), config


def _check_task(description: Description, task: str, *, source: Source) -> None:
    names = {
        "pretrain": "masked image model",
        "classify": "classifier",
        "segment": "segmentation model",
        "encoder": "encoder without a head",
    }
    if description.task != task:
        raise WeightsError(
            f"{os.fspath(source)} holds no {names[task]}; it is a {names[description.task]}"
        )


def _on_device(flat: dict[str, np.ndarray]) -> Params:
    return unflatten({name: jnp.asarray(array) for name, array in flat.items()})


@functools.cache
def _classifier_functions(config: ModelConfig, *, classes: int, pooling: str) -> Functional:
    return classifier(config, classes=classes, pooling=pooling)


@functools.cache
def _masked_image_model_functions(config: ModelConfig, *, vocabulary: int) -> Functional:
    return masked_image_model(config, vocabulary=vocabulary)


@functools.cache
def _segmenter_functions(
    config: ModelConfig, *, head: SegmentHeadConfig, classes: int
) -> Functional:
    return segmenter(config, head=head, classes=classes)
