"""Fine-tuning for semantic segmentation (paper §3.3, appendix I; official semantic_segmentation/).

The host sends crops with their label maps. The encoder sees every patch; outputs of some of its
blocks go through a feature pyramid into a head (`models/segmentation_heads/`). The loss is the
cross-entropy of every pixel, plus an auxiliary head's. Held-out images are evaluated at their own
size, with windows that slide over them, by the mean intersection over union.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from absl import logging

from beit_jax.config import (
    InferenceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SegmentDataConfig,
    SegmentHeadConfig,
    check,
    once_setting,
    shape_setting,
)
from beit_jax.config.bounds import Label, Line, OneOf, check_fields
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.segment import SegmentClasses
from beit_jax.config.unused import Unused
from beit_jax.data.source_kinds import check_sources
from beit_jax.models.flops import segmenter_step_flops
from beit_jax.models.functional import Functional
from beit_jax.models.segmentation_heads import check_head, logits_side
from beit_jax.models.segmenter import segmenter
from beit_jax.preprocessing import normalize
from beit_jax.segmentation import confusion, sliding, windows
from beit_jax.tasks import segment_images
from beit_jax.tasks.feed import draw_first_batch
from beit_jax.tasks.run_job import run_job
from beit_jax.text_table import text_table
from beit_jax.training.job import Job, RunContext, Trained
from beit_jax.training.pixel_loss import pixel_sums
from beit_jax.training.state import Task
from beit_jax.types import Batch, JsonObject, Params, PyTree, Sums, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """All settings of a segmentation run.

    Attributes:
      classes: outputs; 0: as many as the images' classes have names.
      count_ignored: ignored pixels have no loss but count in its mean (mmseg 0.11); False: the mean
        is over labelled pixels (Hugging Face).
      evaluate_only: no training: evaluate the run's newest checkpoint or `run.init_from`.
      labels: names of the classes; () takes the data's, or numbers.
      reference: what the published run reached; logged at the start.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "data.service": Unused("label maps are read on the host that trains"),
    }

    task: Annotated[str, OneOf("segment")] = "segment"
    run: RunConfig
    model: ModelConfig
    head: SegmentHeadConfig
    data: SegmentDataConfig
    inference: InferenceConfig
    optimizer: OptimizerConfig
    classes: SegmentClasses = shape_setting()
    count_ignored: bool = True
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
        segment_images.check_inference(self.data, self.inference)
        check(
            self.classes in (0, len(self.labels)) or not self.labels,
            "labels",
            f"{len(self.labels)} names for {self.classes} classes",
        )
        check_head(self.model, self.head)
        side = logits_side(self.model, self.head)
        check(
            self.model.image_size % side == 0,
            "model.patch_size",
            f"{self.model.patch_size} makes logits {side} wide, of which {self.model.image_size}"
            " pixels are no multiple",
        )
        check(
            self.run.batch_size > self.optimizer.accumulate or self.evaluate_only,
            "run.batch_size",
            f"{self.run.batch_size} in {self.optimizer.accumulate} micro-batches: BatchNorm needs"
            " more than one image in each",
        )
        check_warmup(self.optimizer, self.run)


def run(config: SegmentConfig, *, workdir: str) -> JsonObject:
    """Fine-tunes, or only evaluates; writes `summary.json` and pictures and returns the summary."""
    return run_job(config, build=build_job, workdir=workdir)


def build_job(config: SegmentConfig, context: RunContext) -> Job:
    """Opens the images, whose classes complete the config, and builds the model."""
    images = segment_images.open_images(config.data, labels=config.labels, classes=config.classes)
    config = dataclasses.replace(config, classes=len(images.labels), labels=images.labels)
    model = segmenter(config.model, head=config.head, classes=config.classes)
    if config.reference:
        logging.info("published reference: %s", config.reference)
    feed = segment_images.image_feed(
        images, data=config.data, inference=config.inference, run=config.run
    )
    show = functools.partial(segment_images.first_batch_picture, labels=config.labels)
    painted = segment_images.held_out_picture(
        images, model, data=config.data, inference=config.inference
    )
    return Job(
        task=segment_task(model, config=config),
        feed=draw_first_batch(feed, show, workdir=context.workdir),
        pictures={"segmentation": painted},
        finish=functools.partial(figures, labels=config.labels),
        config=config,
        evaluate_only=config.evaluate_only,
        headline=functools.partial(headline, labels=config.labels),
    )


# Long because its closures are the parts of one step, in order: prepare, predict, score.
def segment_task(model: Functional, *, config: SegmentConfig) -> Task:
    """Segmentation as a task for the train loop; sums are over pixels.

    Args:
      model: from `segmenter`.
      config: normalisation, losses, classes.
    """

    def prepare(frozen: PyTree, batch: Batch, key: jax.Array | None) -> Batch:
        del frozen, key  # the host has drawn everything that is random
        return prepared(batch, normalization=config.data.normalization)

    def loss(
        params: Params, variables: Variables, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums, Variables]:
        del step
        if config.optimizer.freeze_encoder:
            params = params | {"encoder": jax.lax.stop_gradient(params["encoder"])}
        drop_path_key, dropout_key = jax.random.split(key)
        (logits, auxiliary), variables = model.apply_and_update(
            params,
            variables,
            batch["image"],
            train=True,
            drop_path_key=drop_path_key,
            dropout_key=dropout_key,
        )
        sums = pixel_sums(logits, batch["segmentation"])
        total = sums["loss"]
        if auxiliary is not None:
            other = pixel_sums(auxiliary, batch["segmentation"])
            sums["auxiliary"] = other["loss"]
            total = total + config.head.auxiliary_weight * other["loss"]
        pixels = jnp.asarray(batch["segmentation"].size, jnp.float32)
        weight = pixels if config.count_ignored else jnp.maximum(sums["labelled"], 1)
        return total, sums | {"total": total, "weight": weight}, variables

    def evaluate(params: Params, variables: Variables, frozen: PyTree, batch: Batch) -> Sums:
        del frozen

        return sliding.confusion(
            functools.partial(model.apply, params, variables=variables),
            batch,
            normalization=config.data.normalization,
            passes=windows.passes(config.inference),
        )

    flops = segmenter_step_flops(
        config.model,
        head=config.head,
        classes=config.classes,
        frozen_encoder=config.optimizer.freeze_encoder,
    )
    return Task(
        init=model.init,
        init_variables=model.init_variables,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        evaluation_metrics=functools.partial(confusion.scores, names=config.labels),
        frozen={},
        flops_per_image=flops,
        best="miou",
        only_for_training=("auxiliary",),
    )


def prepared(batch: Batch, *, normalization: str) -> Batch:
    """Normalises crops; what is beyond the image becomes 0, the mean colour (mmseg's `Pad`).

    Args:
      batch: `image` uint8 `[b, s, s, 3]`, `segmentation` uint8 `[b, s, s]`, `size` int32 `[b, 2]`,
        rows and columns that are image.
      normalization: a key of `preprocessing.NORMALIZATIONS`.

    Returns:
      `image` float32 `[b, s, s, 3]`, and `segmentation`.
    """
    images = normalize(batch["image"], kind=normalization)
    along = jnp.arange(images.shape[1])
    rows = along[None, :] < batch["size"][:, :1]
    columns = along[None, :] < batch["size"][:, 1:]
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return {"image": jnp.where(inside, images, 0.0), "segmentation": batch["segmentation"]}


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """The loss with the auxiliary head's, each head's own, and labelled pixels that are right."""
    result = {
        "loss": totals["total"] / totals["weight"],
        "head_loss": totals["loss"] / totals["weight"],
        "pixel_accuracy": totals["correct"] / jnp.maximum(totals["labelled"], 1),
    }
    if "auxiliary" in totals:
        result["auxiliary_loss"] = totals["auxiliary"] / totals["weight"]
    return result


def figures(trained: Trained, *, labels: tuple[str, ...]) -> JsonObject:
    """The job's part of `summary.json`; logs a table of the classes."""
    if trained.evaluation:
        logging.info("held-out images by class:\n%s", class_table(trained.evaluation, labels))
        absent = [name for name in labels if f"iou/{name}" not in trained.evaluation]
        if absent:
            logging.info("neither labelled nor predicted, and not in the means: %s", _few(absent))
    return trained.evaluation | {"best": trained.best}


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_table(evaluation: Mapping[str, float], labels: tuple[str, ...]) -> str:
    """Intersection over union of every class that is predicted or labelled."""
    found = {name: evaluation.get(f"iou/{name}") for name in labels}
    rows = [(name, f"{iou:.1%}") for name, iou in found.items() if iou is not None]
    return text_table(rows, header=("class", "IoU"), align="lr")


def headline(evaluation: Mapping[str, float], *, labels: tuple[str, ...]) -> str:
    """The classes' table and, below, an evaluation in one line."""
    if not evaluation:
        return "no held-out images"
    line = (
        f"mIoU {evaluation['miou']:.2%}  mAcc {evaluation['macc']:.2%}"
        f"  aAcc {evaluation['aacc']:.2%}"
    )
    return f"{class_table(evaluation, labels)}\n\n{line}"
