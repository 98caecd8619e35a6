"""What a checkpoint is: everything that a format's key table, config or model card depends on."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from beit_jax.config import ModelConfig, check, one_of, parse, to_dict
from beit_jax.models.blocks import layer_norm
from beit_jax.models.functional import flatten, functional
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import NORMALIZATIONS


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
      mask_token: whether the encoder has one; "encoder" only, the other tasks say.
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

    def __post_init__(self):
        one_of(self.task, "task", "pretrain", "classify", "encoder")
        one_of(self.pooling, "pooling", "mean", "cls", "none")
        one_of(self.normalization, "normalization", *NORMALIZATIONS)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters' names ("encoder/cls_token") and shapes."""
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


def describe(config: dict[str, Any]) -> Description:
    """Reads the description from the config saved beside a checkpoint.

    Args:
      config: of a pre-training run, its `to_dict(PretrainConfig)`. Else a dict with `task`,
        `model`, `data: {"normalization"}` and, for "classify", `classes`, `pooling` and perhaps
        `labels`; `to_config` writes one.

    Raises:
      ConfigError: a key is missing or wrong, or this kind of run has no foreign format.
    """
    task = config.get("task")
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


def to_config(description: Description) -> dict[str, Any]:
    """The inverse of `describe`, as plain dicts and lists."""
    config: dict[str, Any] = {
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
