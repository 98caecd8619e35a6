"""Fine-tuning for classification (paper §3.1, appendix H; official run_class_finetuning.py).

The host sends images and labels, cropped, flipped and with RandAugment. On the device come random
erasing, mixup or CutMix; the encoder sees every patch; its patch tokens are averaged, normalised
and classified; the loss is the label-smoothed cross-entropy. Held-out images are evaluated in one
centre crop.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from beit_jax.config import (
    LabelledDataConfig,
    MixingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    check,
    once_setting,
    shape_setting,
)
from beit_jax.config.bounds import Classes, Label, Line, OneOf, Rate, Within, check_fields
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.unused import Unused
from beit_jax.data.source_kinds import check_sources
from beit_jax.drawing import sheets
from beit_jax.models.flops import classifier_flops
from beit_jax.models.functional import Functional
from beit_jax.models.heads import classifier
from beit_jax.preprocessing import NORMALIZATIONS, normalize
from beit_jax.tasks.feed import (
    check_class_count,
    draw_first_batch,
    labelled_feed,
)
from beit_jax.tasks.run_job import run_job
from beit_jax.training.batch_augment import erase, image_weights, mix, smoothed_cross_entropy
from beit_jax.training.job import Job, RunContext, Trained
from beit_jax.training.state import Task
from beit_jax.types import Batch, HostBatch, JsonObject, Params, PyTree, Sums

PICTURES = 8  # images in `first_batch.png`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """All settings of a fine-tuning run.

    Attributes:
      classes: outputs; 0: as many as the images have.
      pooling: "mean" of the patch tokens with a LayerNorm of its own, or "cls".
      head_init_scale: factor on the head's initial values (official `--init_scale`).
      label_smoothing: share of the target spread over all classes.
      mixing: mixup and CutMix; the recipes that start from ImageNet-22k labels use neither.
      evaluate_only: no training: evaluate the run's newest checkpoint or `run.init_from`.
      labels: names of the classes, filled in from the images; a mismatch is an error.
      reference: what the published run reached; logged at the start.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "run.picture_every": Unused("classification draws no pictures"),
        "optimizer.freeze_encoder": Unused("configs/probe_base.py probes frozen features"),
    }

    task: Annotated[str, OneOf("classify")] = "classify"
    run: RunConfig
    model: ModelConfig
    data: LabelledDataConfig
    optimizer: OptimizerConfig
    mixing: MixingConfig
    classes: Classes = shape_setting()
    pooling: Annotated[str, OneOf("mean", "cls")] = shape_setting("mean")
    head_init_scale: Annotated[float, Within(ge=0, le=1000)] = 0.001
    label_smoothing: Rate = 0.1
    evaluate_only: bool = False
    labels: tuple[Label, ...] = once_setting(())
    reference: Line = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.data)
        check(
            self.data.image_size == self.model.image_size,
            "data.image_size",
            f"{self.data.image_size}, but the model takes {self.model.image_size}",
        )
        check(
            self.run.batch_size % self.mixing.groups == 0,
            "mixing.groups",
            f"{self.mixing.groups} does not divide run.batch_size, {self.run.batch_size}",
        )
        check_warmup(self.optimizer, self.run)


def run(config: ClassifyConfig, *, workdir: str) -> JsonObject:
    """Fine-tunes, or only evaluates; writes `summary.json` and returns it."""
    return run_job(config, build=build_job, workdir=workdir)


def build_job(config: ClassifyConfig, context: RunContext) -> Job:
    """Opens the images, whose classes complete the config, and builds the model."""
    feed, classes = labelled_feed(config.data, run=config.run)
    config = with_classes(config, classes)
    if config.reference:
        logging.info("published reference: %s", config.reference)
    draw = functools.partial(first_batch_picture, config=config)
    return Job(
        task=task_from_config(config),
        feed=draw_first_batch(feed, draw, workdir=context.workdir),
        finish=figures,
        config=config,
        evaluate_only=config.evaluate_only,
        headline=headline,
    )


def with_classes(config: ClassifyConfig, classes: tuple[str, ...]) -> ClassifyConfig:
    """Fills in the images' classes.

    Raises:
      ConfigError: the config asks for other classes, or another number of them, than the images
        have.
    """
    check_class_count(config.classes, classes, source=config.data.source)
    check(
        config.labels in ((), classes),
        "config.labels",
        f"these are not the classes of {config.data.source}; leave it empty",
    )
    return dataclasses.replace(config, classes=len(classes), labels=classes)


def task_from_config(config: ClassifyConfig) -> Task:
    """The task of a config that says how many classes there are, with its model."""
    model = classifier(
        config.model,
        classes=config.classes,
        pooling=config.pooling,
        init_scale=config.head_init_scale,
    )
    return classify_task(model, config=config)


def classify_task(model: Functional, *, config: ClassifyConfig) -> Task:
    """Fine-tuning as a task for the train loop; sums are over images.

    Args:
      model: from `classifier`.
      config: normalisation, erasing, mixing, smoothing.
    """
    smoothing = config.label_smoothing

    def prepare(frozen: PyTree, batch: Batch, key: jax.Array | None) -> Batch:
        del frozen
        return prepared(batch, key, config=config)

    def loss(
        params: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums]:
        del step
        logits = model.apply(params, batch["image"], drop_path_key=key)
        own = smoothed_cross_entropy(logits, batch["label"], smoothing=smoothing)
        other = smoothed_cross_entropy(logits, batch["partner"], smoothing=smoothing)
        mixed = batch["share"] * own + (1 - batch["share"]) * other
        total = (mixed * batch["weight"]).sum()
        return total, {"loss": total, "weight": batch["weight"].sum()}

    def evaluate(params: Params, frozen: PyTree, batch: Batch) -> Sums:
        """Plain cross-entropy, top-1 and top-5."""
        batch = prepare(frozen, batch, None)
        logits = model.apply(params, batch["image"])
        labels, weight = batch["label"], batch["weight"]
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        correct = best == labels[:, None]
        plain = smoothed_cross_entropy(logits, labels, smoothing=0.0)
        return {
            "loss": (plain * weight).sum(),
            "top1": (correct[:, 0] * weight).sum(),
            "top5": (correct.any(axis=1) * weight).sum(),
            "weight": weight.sum(),
        }

    def metrics(totals: Sums) -> dict[str, jax.Array]:
        return {
            name: total / totals["weight"] for name, total in totals.items() if name != "weight"
        }

    forward = classifier_flops(config.model, classes=config.classes)
    return Task(
        init=model.init,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        frozen={},
        flops_per_image=3 * forward,
        best="top1",
    )


def prepared(batch: Batch, key: jax.Array | None, *, config: ClassifyConfig) -> Batch:
    """Normalises, erases and mixes images.

    Args:
      batch: `image` uint8 `[b, s, s, 3]`, `label` int32 `[b]`; of held-out images also `valid`
        `[b]`.
      key: randomness; None (evaluation) neither erases nor mixes.
      config: normalisation, erasing, mixing.

    Returns:
      `image` float32 `[b, s, s, 3]`; `label` and `partner`, int32 `[b]`, with the `share` of the
      former in the target; `weight`, float32 `[b]`.
    """
    images, labels = normalize(batch["image"], kind=config.data.normalization), batch["label"]
    labels = jnp.maximum(labels, 0)  # without a class, `image_weights` is 0
    partner, share = labels, jnp.ones(labels.shape, jnp.float32)
    if key is not None:
        erasing, mixing = jax.random.split(key)
        if config.data.augment.erase_probability:
            images = erase(images, key=erasing, probability=config.data.augment.erase_probability)
        images, partner, share = mix(images, labels, key=mixing, config=config.mixing)
    return {
        "image": images,
        "label": labels,
        "partner": partner,
        "share": share,
        "weight": image_weights(batch),
    }


def first_batch_picture(batch: HostBatch, *, config: ClassifyConfig) -> np.ndarray:
    """Draws views as they come from the host, and as the model is given them: erased and mixed.

    Groups of the global batch are mixed, which may be spread over hosts; for the picture this
    host's part is one group.

    Args:
      batch: this host's part of a training batch.
      config: the job's.

    Returns:
      uint8 `[h, w, 3]`.
    """
    alone = dataclasses.replace(config, mixing=dataclasses.replace(config.mixing, groups=1))
    prepare = jax.jit(functools.partial(prepared, config=alone))
    whole = prepare(batch, jax.random.key(config.run.seed))
    mean, std = NORMALIZATIONS[config.data.normalization]
    given = np.asarray(whole["image"][:PICTURES]) * np.asarray(std) + np.asarray(mean)
    return sheets.columns_sheet(
        {"view": batch["image"][:PICTURES], "given": sheets.to_uint8(given)}
    )


def figures(trained: Trained) -> JsonObject:
    """The job's part of `summary.json`."""
    return trained.evaluation | {"best": trained.best}


def headline(evaluation: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    if not evaluation:
        return "no held-out images"
    return f"top-1 {evaluation['top1']:.2%}  top-5 {evaluation['top5']:.2%}"
