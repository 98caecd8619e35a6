"""What a checkpoint is: everything that a format's key table, config or model card depends on."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from beit_jax.config import ModelConfig, check, one_of, parse, to_dict
from beit_jax.models.blocks import layer_norm
from beit_jax.models.functional import flatten, functional
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import JsonObject
from beit_jax.weights.report import WeightsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The kind and sizes of a checkpoint.

    Attributes:
      task: "pretrain" (encoder and `lm_head`), "classify" (encoder and `head`) or "encoder" (no
        head, as timm's and Hugging Face's bare models).
      model: the encoder.
      outputs: vocabulary ("pretrain") or classes ("classify"); 0 for "encoder".
      pooling: "classify": "mean" or "cls". "encoder": "mean" where there is an `fc_norm`, "cls"
        where the encoder ends in its norm, "none" where there is neither.
      mask_token: whether the encoder has one; read for "encoder" only, since the other tasks
        determine it.
      normalization: of the pixels, a key of `preprocessing.NORMALIZATIONS`.
      labels: names of the classes; empty where they are unknown.
    """

    task: str
    model: ModelConfig
    outputs: int
    pooling: str = "mean"
    mask_token: bool = False
    normalization: str = "half"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.task, "task", "pretrain", "classify", "encoder")
        one_of(self.pooling, "pooling", "mean", "cls", "none")
        one_of(self.normalization, "normalization", *NORMALIZATIONS)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters' names ("encoder/cls_token"), shapes and dtypes."""
        return dict(_shapes(self))


@functools.cache
def _shapes(description: Description) -> dict[str, jax.ShapeDtypeStruct]:
    model, outputs = description.model, description.outputs
    if description.task == "pretrain":
        whole = masked_image_model(model, vocabulary=outputs)
    elif description.task == "classify":
        whole = classifier(model, classes=outputs, pooling=description.pooling)
    else:
        whole = functional(lambda rngs: _Headless(description, rngs=rngs))
    return flatten(whole.shapes())


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


def describe(config: JsonObject) -> Description:
    """Reads the description from the config saved beside a checkpoint.

    Args:
      config: `to_dict(PretrainConfig)` for a pre-training run; otherwise a dict with `task`,
        `model`, `data: {"normalization"}` and, for "classify", `classes`, `pooling` and perhaps
        `labels`, as `to_config` writes it.

    Raises:
      ConfigError: a key is missing or wrong, or this kind of run has no foreign format.
    """
    task = str(config.get("task"))
    one_of(task, "task", "pretrain", "classify", "encoder")
    required = {
        "pretrain": ("model", "data", "tokenizer"),
        "classify": ("model", "data", "classes", "pooling"),
        "encoder": ("model", "data", "pooling", "mask_token"),
    }[task]
    for key in required:
        check(key in config, key, "missing from the checkpoint's config")
    outputs = 0
    if task == "pretrain":
        outputs = config["tokenizer"]["vocabulary"]
    elif task == "classify":
        outputs = config["classes"]
    return Description(
        task=task,
        model=parse(ModelConfig, config["model"], path="model"),
        outputs=outputs,
        pooling=config.get("pooling", "mean"),
        mask_token=config.get("mask_token", False),
        normalization=config["data"]["normalization"],
        labels=tuple(config.get("labels", ())),
    )


def to_config(description: Description) -> JsonObject:
    """The inverse of `describe`, as plain dicts and lists."""
    config: JsonObject = {
        "task": description.task,
        "model": to_dict(description.model),
        "data": {"normalization": description.normalization},
    }
    if description.task == "pretrain":
        config["tokenizer"] = {"vocabulary": description.outputs}
    if description.task == "classify":
        config |= {"classes": description.outputs, "labels": list(description.labels)}
    if description.task == "encoder":
        config["mask_token"] = description.mask_token
    if description.task != "pretrain":
        config["pooling"] = description.pooling
    return config


def sentence(description: Description) -> str:
    """Describes the task and the sizes in one line."""
    model = description.model
    head = {
        "pretrain": f"masked image modelling, {description.outputs} tokens",
        "classify": f"classification, {description.outputs} classes, pooling {description.pooling}",
        "encoder": "encoder without a head",
    }[description.task]
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
