"""What a checkpoint is: everything that a format's key table, config or model card depends on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from beit_jax.config import ConfigError, ModelConfig, check, one_of, parse, to_dict
from beit_jax.config.bounds import INT32
from beit_jax.config.parse import shown
from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.models.blocks import layer_norm
from beit_jax.models.functional import Functional, flatten, functional
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.models.segmenter import segmenter
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import JsonObject
from beit_jax.weights.report import WeightsError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The kind and sizes of a checkpoint.

    Attributes:
      task: a key of `KINDS`: "pretrain" (encoder and `lm_head`), "classify" (encoder and `head`),
        "segment" (encoder, `neck`, `head` and `auxiliary`) or "encoder" (no head, as timm's and
        Hugging Face's bare models).
      model: the encoder.
      outputs: vocabulary ("pretrain") or classes ("classify", "segment"); 0 for "encoder".
      pooling: "classify": "mean" or "cls". "encoder": "mean" where there is an `fc_norm`, "cls"
        where the encoder ends in its norm, "none" where there is neither.
      mask_token: whether the encoder has one; read for "encoder" only, since the other tasks
        determine it.
      normalization: of the pixels, a key of `preprocessing.NORMALIZATIONS`.
      labels: names of the classes; empty where they are unknown.
      head: "segment": what is on the encoder; None for the others.
    """

    task: str
    model: ModelConfig
    outputs: int
    pooling: str = "mean"
    mask_token: bool = False
    normalization: str = "half"
    labels: tuple[str, ...] = ()
    head: SegmentHeadConfig | None = None

    def __post_init__(self) -> None:
        one_of(self.task, "task", *KINDS)
        check((self.task == "segment") == (self.head is not None), "head", "only of a segmenter")
        one_of(self.pooling, "pooling", "mean", "cls", "none")
        one_of(self.normalization, "normalization", *NORMALIZATIONS)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names ("encoder/cls_token"), shapes and dtypes of all that a checkpoint of it holds.

        These are the parameters, and behind them the variables where the model has any.
        """
        params, variables = _shapes(self)
        return {**params, **variables}

    def variables(self) -> frozenset[str]:
        """The names among `shapes` of what no gradient trains: BatchNorm's running statistics."""
        return frozenset(_shapes(self)[1])

    def split(self, flat: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Splits a flat tree of both into parameters and variables."""
        names = self.variables()
        params = {name: leaf for name, leaf in flat.items() if name not in names}
        return params, {name: leaf for name, leaf in flat.items() if name in names}


Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]


@functools.cache
def _shapes(description: Description) -> tuple[Shapes, Shapes]:
    """Of the parameters and of the variables."""
    model = KINDS[description.task].build(description)
    return flatten(model.shapes()), flatten(model.variables_shapes())


class _Headless(nnx.Module):
    def __init__(self, description: Description, *, rngs: nnx.Rngs):
        self.encoder = Encoder(
            description.model,
            mask_token=description.mask_token,
            final_norm=description.pooling == "cls",
            rngs=rngs,
        )
        if description.pooling == "mean":
            self.fc_norm = layer_norm(description.model, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of checkpoint: what follows from `Description.task`.

    Attributes:
      required: keys of the config saved beside a checkpoint, besides `model` and `data`.
      outputs: that config → `Description.outputs`.
      settings: description → that config's keys besides `task`, `model` and `data`.
      build: description → the model.
      head: description → the head in a few words.
    """

    required: tuple[str, ...]
    outputs: Callable[[JsonObject], int]
    settings: Callable[[Description], JsonObject]
    build: Callable[[Description], Functional]
    head: Callable[[Description], str]


def _head(description: Description) -> SegmentHeadConfig:
    assert description.head is not None  # `__post_init__` has checked
    return description.head


KINDS = {
    "pretrain": Kind(
        required=("tokenizer",),
        outputs=lambda config: config["tokenizer"]["vocabulary"],
        settings=lambda it: {"tokenizer": {"vocabulary": it.outputs}},
        build=lambda it: masked_image_model(it.model, vocabulary=it.outputs),
        head=lambda it: f"masked image modelling, {it.outputs} tokens",
    ),
    "classify": Kind(
        required=("classes", "pooling"),
        outputs=lambda config: config["classes"],
        settings=lambda it: {
            "classes": it.outputs,
            "labels": list(it.labels),
            "pooling": it.pooling,
        },
        build=lambda it: classifier(it.model, classes=it.outputs, pooling=it.pooling),
        head=lambda it: f"classification, {it.outputs} classes, pooling {it.pooling}",
    ),
    "segment": Kind(
        required=("classes", "head"),
        outputs=lambda config: config["classes"],
        settings=lambda it: {
            "classes": it.outputs,
            "labels": list(it.labels),
            "head": to_dict(_head(it)),
        },
        build=lambda it: segmenter(it.model, head=_head(it), classes=it.outputs),
        head=lambda it: (
            f"segmentation by {_head(it).kind}, {it.outputs} classes, of blocks"
            f" {', '.join(map(str, _head(it).blocks))}"
        ),
    ),
    "encoder": Kind(
        required=("pooling", "mask_token"),
        outputs=lambda config: 0,
        settings=lambda it: {"mask_token": it.mask_token, "pooling": it.pooling},
        build=lambda it: functional(lambda rngs: _Headless(it, rngs=rngs)),
        head=lambda it: "encoder without a head",
    ),
}


def describe(config: JsonObject) -> Description:
    """Reads the description from the config saved beside a checkpoint.

    Args:
      config: `to_dict(PretrainConfig)` for a pre-training run; otherwise a dict with `task`,
        `model`, `data: {"normalization"}` and, for "classify", `classes`, `pooling` and perhaps
        `labels`, for "segment" `head` in place of `pooling`, as `to_config` writes it.

    Raises:
      ConfigError: a key is missing or wrong, or this kind of run has no foreign format.
    """
    task = str(config.get("task"))
    one_of(task, "task", *KINDS)
    kind = KINDS[task]
    for key in ("model", "data", *kind.required):
        check(key in config, key, "missing from the checkpoint's config")
    try:
        outputs, normalization = kind.outputs(config), config["data"]["normalization"]
    except (LookupError, TypeError):
        raise ConfigError("the checkpoint's config has a value where a section is due") from None
    mask_token, pooling = config.get("mask_token", False), config.get("pooling", "mean")
    labels = config.get("labels", [])
    origin = config.get("imported_from", {})
    is_section = isinstance(origin, dict) and all(
        isinstance(origin.get(key, {}), dict) for key in ("guessed", "kept")
    )
    if not is_section:
        raise ConfigError("imported_from: must be a section, of sections guessed and kept")
    # The config of a file may hold anything.
    whole = type(outputs) is int and 0 <= outputs <= INT32
    check(whole, "outputs", f"{shown(outputs)} is no whole number")
    check(isinstance(mask_token, bool), "mask_token", f"{shown(mask_token)} is no bool")
    check(
        isinstance(labels, list | tuple) and all(isinstance(label, str) for label in labels),
        "labels",
        "must be a list of names",
    )
    return Description(
        task=task,
        model=parse(ModelConfig, config["model"], path="model"),
        outputs=outputs,
        pooling=pooling,
        mask_token=mask_token,
        normalization=normalization,
        labels=tuple(labels),
        head=parse(SegmentHeadConfig, config["head"], path="head") if task == "segment" else None,
    )


def to_config(description: Description) -> JsonObject:
    """The inverse of `describe`, as plain dicts and lists."""
    return {
        "task": description.task,
        "model": to_dict(description.model),
        "data": {"normalization": description.normalization},
        **KINDS[description.task].settings(description),
    }


def sentence(description: Description) -> str:
    """Describes the task and the sizes in one line."""
    model = description.model
    head = KINDS[description.task].head(description)
    return (
        f"{head}; {model.layers} layers, width {model.width}, {model.heads} heads, MLP"
        f" {model.mlp_width}; image {model.image_size}, patch {model.patch_size}; positions"
        f" {model.positions}, LayerScale {'yes' if model.layer_scale_init else 'no'};"
        f" normalization {description.normalization}"
    )


def normalization_of(mean: Sequence[float], std: Sequence[float], *, source: str) -> str:
    """The name of a normalisation given by its numbers.

    Args:
      mean, std: of [0, 1] pixels, RGB.
      source: for the message.

    Raises:
      WeightsError: there is no normalisation with these numbers.
    """
    for name, values in NORMALIZATIONS.items():
        if np.shape(mean) == np.shape(std) == (3,) and np.allclose([mean, std], values):
            return name
    raise WeightsError(
        f"{source} has a mean and deviation that are none of {', '.join(NORMALIZATIONS)};"
        " say which to take: --normalization"
    )
