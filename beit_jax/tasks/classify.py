"""Fine-tuning for classification (paper §3.1, appendix H; official run_class_finetuning.py).

Images and labels come from the host, cropped, flipped and with RandAugment. On the device: random
erasing, mixup or CutMix; the encoder sees every patch; its patch tokens are averaged, normalised
and classified; the loss is the label-smoothed cross-entropy. Held-out images are all evaluated, one
centre crop each.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from beit_jax import pictures
from beit_jax.config import (
    ConfigError,
    LabelledDataConfig,
    MixingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    check,
    one_of,
    shape_setting,
)
from beit_jax.models.flops import classifier_flops
from beit_jax.models.functional import Functional
from beit_jax.models.heads import classifier
from beit_jax.preprocessing import NORMALIZATIONS, normalize
from beit_jax.tasks.feed import check_class_count, labelled_feed, with_first
from beit_jax.tasks.summary import write_summary
from beit_jax.training import checkpoint, loop, optim, startup, state
from beit_jax.training.batch_augment import erase, mix, smoothed_cross_entropy
from beit_jax.training.state import Batch, Sums, Task

PICTURES = 8  # images in `first_batch.png`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Everything a fine-tuning run is made of.

    Attributes:
      classes: outputs; 0: as many as the images have.
      pooling: "mean" of the patch tokens with a LayerNorm of its own, or "cls".
      head_init_scale: the head starts this much smaller (official `--init_scale`).
      label_smoothing: share of the target spread over all classes.
      mixing: mixup and CutMix; the recipes from ImageNet-22k labels have neither.
      evaluate_only: no training: evaluate the run's newest checkpoint or `run.init_from`.
      labels: names of the classes; filled in from the images.
      reference: what the published run reached, printed at the start.
    """

    task: str = "classify"
    run: RunConfig
    model: ModelConfig
    data: LabelledDataConfig
    optimizer: OptimizerConfig
    mixing: MixingConfig
    classes: int = shape_setting()
    pooling: str = shape_setting("mean")
    head_init_scale: float = 0.001
    label_smoothing: float = 0.1
    evaluate_only: bool = False
    labels: tuple[str, ...] = ()
    reference: str = ""

    def __post_init__(self):
        check(
            self.data.image_size == self.model.image_size,
            "data.image_size",
            f"{self.data.image_size}, but the model takes {self.model.image_size}",
        )
        check(self.classes >= 0, "classes", "must not be negative")
        one_of(self.pooling, "pooling", "mean", "cls")
        check(0 <= self.label_smoothing < 1, "label_smoothing", "must be in [0, 1)")
        check(
            self.run.batch_size % self.mixing.groups == 0,
            "mixing.groups",
            f"{self.mixing.groups} does not divide run.batch_size, {self.run.batch_size}",
        )
        if self.optimizer.warmup_steps > self.run.steps:
            raise ConfigError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is more than run.steps,"
                f" {self.run.steps}"
            )


def run(config: ClassifyConfig, *, workdir: str) -> dict[str, Any]:
    """Fine-tunes, or only evaluates; writes `summary.json` and returns it."""
    began, begun = time.perf_counter(), startup.Startup()
    loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    feed, classes = labelled_feed(config.data, run=config.run)
    config = with_classes(config, classes)
    model = classifier(
        config.model,
        classes=config.classes,
        pooling=config.pooling,
        init_scale=config.head_init_scale,
    )
    task = classify_task(model, config=config)
    if config.reference:
        logging.info("published reference: %s", config.reference)
    if config.evaluate_only:
        return evaluate_only(task, feed, config=config, workdir=workdir)
    training = show_first(feed.training, config=config, workdir=workdir)
    begun.done("data")
    trained = loop.train(
        task,
        dataclasses.replace(feed, training=training),
        run=config.run,
        optimizer_config=config.optimizer,
        config=config,
        workdir=workdir,
        begun=begun,
    )
    figures = trained.evaluation | {"best": trained.best}
    return write_summary(figures, trained=trained, workdir=workdir, began=began)


def with_classes(config: ClassifyConfig, classes: tuple[str, ...]) -> ClassifyConfig:
    """The config with the images' classes filled in.

    Raises:
      ConfigError: it asks for another number of classes than the images have.
    """
    check_class_count(config.classes, classes, source=config.data.source)
    return dataclasses.replace(config, classes=len(classes), labels=classes)


def classify_task(model: Functional, *, config: ClassifyConfig) -> Task:
    """The job as the train loop wants it; sums are over images.

    Args:
      model: from `classifier`.
      config: normalisation, erasing, mixing, smoothing.
    """
    smoothing = config.label_smoothing

    def prepare(frozen: Any, batch: Batch, key: jax.Array | None) -> Batch:
        del frozen
        return prepared(batch, key, config=config)

    def loss(params: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Sums]:
        del step
        logits = model.apply(params, batch["image"], drop_path_key=key)
        own = smoothed_cross_entropy(logits, batch["label"], smoothing=smoothing)
        other = smoothed_cross_entropy(logits, batch["partner"], smoothing=smoothing)
        each = batch["share"] * own + (1 - batch["share"]) * other
        total = (each * batch["weight"]).sum()
        return total, {"loss": total, "weight": batch["weight"].sum()}

    def evaluate(params: Any, frozen: Any, batch: Batch) -> Sums:
        """Plain cross-entropy, top-1 and top-5."""
        batch = prepare(frozen, batch, None)
        logits = model.apply(params, batch["image"])
        labels, weight = batch["label"], batch["weight"]
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        right = best == labels[:, None]
        plain = smoothed_cross_entropy(logits, labels, smoothing=0.0)
        return {
            "loss": (plain * weight).sum(),
            "top1": (right[:, 0] * weight).sum(),
            "top5": (right.any(axis=1) * weight).sum(),
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
    """What the host sends → normalised, erased, mixed images; both labels and their shares.

    Args:
      batch: `image` uint8 [b, s, s, 3], `label` int32 [b]; held-out ones have `valid` [b].
      key: None is evaluation: nothing random.
      config: normalisation, erasing, mixing.
    """
    images, labels = normalize(batch["image"], kind=config.data.normalization), batch["label"]
    # Where nothing could be decoded there is a grey image without a class.
    weight = (labels >= 0).astype(jnp.float32)
    if "valid" in batch:  # padding of a last batch counts for nothing
        weight = weight * batch["valid"]
    labels = jnp.maximum(labels, 0)
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
        "weight": weight,
    }


def evaluate_only(
    task: Task, feed: loop.Feed, *, config: ClassifyConfig, workdir: str
) -> dict[str, Any]:
    """Evaluates what training would start from, on all held-out images.

    Raises:
      ConfigError: there is neither a checkpoint in the run's directory nor `run.init_from`.
    """
    mesh = loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    optimizer = optim.adamw(config.optimizer)
    average = config.optimizer.ema_decay is not None
    shapes = state.state_shapes(task, optimizer, mesh, average=average)
    checkpoints = checkpoint.Checkpoints(workdir, run=config.run, config=config)
    check(
        bool(config.run.init_from) or checkpoints.latest_step() is not None,
        "config.run.init_from",
        f"nothing to evaluate: no checkpoint in {workdir} either",
    )
    train_state = loop.restore_or_init(task, optimizer, checkpoints, shapes=shapes, run=config.run)
    checkpoints.close()
    evaluation = loop.evaluator(task, feed, frozen={}, mesh=mesh)(train_state)
    if evaluation is None:
        raise loop.cluster.Preempted(int(train_state.step))
    summary = {"steps": int(train_state.step), **evaluation}
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "evaluation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2) + "\n")
        print(f"top-1 {summary['top1']:.2%}  top-5 {summary['top5']:.2%}  {path}")
    return summary


def show_first(
    training: Callable[[int], Iterator[dict[str, np.ndarray]]],
    *,
    config: ClassifyConfig,
    workdir: str,
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """Writes `first_batch.png` when the first batch is read: what the model is really given."""

    def draw(batch: dict[str, np.ndarray]) -> None:
        # Mixing is within groups of the whole batch, which may be on several hosts: here only this
        # host's part, in one group.
        alone = dataclasses.replace(config, mixing=dataclasses.replace(config.mixing, groups=1))
        prepare = jax.jit(functools.partial(prepared, config=alone))
        whole = prepare(batch, jax.random.key(config.run.seed))
        mean, std = NORMALIZATIONS[config.data.normalization]
        given = np.asarray(whole["image"][:PICTURES]) * np.asarray(std) + np.asarray(mean)
        columns = {"view": batch["image"][:PICTURES], "given": pictures.to_uint8(given)}
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        pictures.save_png(
            f"{workdir}/first_batch.png", pictures.contact_sheet(rows, captions=list(columns))
        )

    return with_first(training, draw)
