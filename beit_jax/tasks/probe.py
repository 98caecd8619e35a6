"""Probe job: evaluates frozen features by a linear probe of every block and weighted k-NN.

Paper appendix D; official run_linear_eval.py; DINO's k-NN vote. The job opens the labelled images
and the checkpoint, runs both evaluations and writes one summary; what they compute is in
`beit_jax/evaluation`.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, ClassVar

import jax
from absl import logging
from jax.sharding import Mesh

from beit_jax.config import (
    ConfigError,
    LabelledDataConfig,
    OptimizerConfig,
    RunConfig,
    check,
    shape_setting,
)
from beit_jax.config.bounds import Block, Classes, Line, OneOf, Within, check_fields
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.unused import Unused
from beit_jax.data.source_kinds import check_sources
from beit_jax.evaluation.features import (
    KINDS,
    FeatureSpec,
    FrozenEncoder,
    check_blocks,
    chosen_blocks,
    load_frozen_encoder,
)
from beit_jax.evaluation.knn import KnnConfig, block_accuracy
from beit_jax.evaluation.linear_probe import feature_function, probe_task, stored_feed
from beit_jax.tasks.feed import check_class_count, feed_of, labelled_sources
from beit_jax.tasks.summary import write_summary
from beit_jax.text_table import text_table
from beit_jax.training import loop, metrics, run_directory, same_run, start
from beit_jax.types import HostBatch, JsonObject


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """All settings of a probe. The model is the checkpoint's own.

    Attributes:
      run: `init_from` is the checkpoint to probe; `steps` are the linear probe's.
      data: `image_size` may differ from the checkpoint's: its positions are resized.
      classes: outputs; 0: as many as the images have.
      features: "mean": the patch tokens' average (paper); "cls_mean": the class token, then that
        average (official code). Of a block's raw output, without the final norm.
      blocks: that get a classifier, numbered from 1 as in the paper ("9th layer"; the official
        `acc1_layer8`, counted from 0, is block 9); empty for every block.
      linear: whether to train the linear probe.
      neighbours: k-NN.
      cached_views: 0: features are computed from new views of each training batch (official). K:
        those of the first K epochs are computed once, kept in float16 in the hosts' memory and
        used in turn. The held-out images' are then kept too.
      reference: the published figure, logged at the start.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "run.picture_every": Unused("a probe draws no pictures"),
        "optimizer.decay_relative_positions": Unused("the encoder is frozen"),
        "optimizer.decay_class_token": Unused("the encoder is frozen"),
        "optimizer.freeze_encoder": Unused("the encoder is frozen anyway"),
    }

    task: Annotated[str, OneOf("probe")] = "probe"
    run: RunConfig
    data: LabelledDataConfig
    optimizer: OptimizerConfig
    classes: Classes = shape_setting(0)
    features: Annotated[str, OneOf(table=KINDS)] = "mean"
    blocks: tuple[Block, ...] = ()
    linear: bool = True
    neighbours: KnnConfig = dataclasses.field(default_factory=KnnConfig)
    cached_views: Annotated[int, Within(ge=0, le=10_000)] = 0
    reference: Line = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.data)
        check(bool(self.run.init_from), "run.init_from", "missing: the checkpoint to probe")
        for name in ("init_allow_missing", "init_allow_unused"):
            check(
                not getattr(self.run, name),
                f"run.{name}",
                "a probe takes the encoder alone and all of it; import a checkpoint that needs"
                " this with `python -m beit_jax.weights import` first",
            )
        check_blocks(self.blocks)
        check(
            self.linear or bool(self.neighbours.counts),
            "linear",
            "false, and neighbours.counts is empty: nothing to do",
        )
        check(
            self.linear or not self.blocks,
            "blocks",
            f"{self.blocks} would have no effect: linear is false; k-NN's are neighbours.blocks",
        )
        optimizer = self.optimizer
        check(
            optimizer.clip_norm is None,
            "optimizer.clip_norm",
            "must be None: a norm over all classifiers would tie them to each other",
        )
        check(optimizer.layer_decay == 1, "optimizer.layer_decay", "must be 1: nothing is stacked")
        check(optimizer.ema_decay is None, "optimizer.ema_decay", "must be None in a probe")
        check_warmup(optimizer, self.run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """This host's labelled images.

    Attributes:
      feed: augmented training batches and held-out ones.
      bank: a fresh pass over the training images, not augmented and padded as held-out ones are.
      classes: how many.
      size: training images of all hosts.
    """

    feed: loop.Feed
    bank: Callable[[], Iterable[HostBatch]]
    classes: int
    size: int


def run(config: ProbeConfig, *, workdir: str) -> JsonObject:
    """Probes the checkpoint; writes `summary.json`, prints a table and returns the summary."""
    with run_directory.opened(workdir):
        return _run(config, workdir=workdir)


def _run(config: ProbeConfig, *, workdir: str) -> JsonObject:
    began = time.perf_counter()
    mesh = loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    start.source_facts(config, run=config.run, workdir=workdir)
    images = open_images(config)
    config = dataclasses.replace(config, classes=images.classes)
    encoder = load_frozen_encoder(
        config.run.init_from,
        image_size=config.data.image_size,
        normalization=config.data.normalization,  # `source_facts` has compared it
    )
    # Validate both before the long linear probe starts.
    spec = feature_spec(config, layers=encoder.model.layers)
    check_neighbours(config.neighbours, layers=encoder.model.layers, images=images.size)
    if config.reference:
        logging.info("published reference: %s", config.reference)

    summary: JsonObject = {"init_from": config.run.init_from, "features": config.features}
    if config.linear:
        check_same_probe(config, workdir=workdir)
        trained = train_probe(encoder, images, config=config, spec=spec, mesh=mesh, workdir=workdir)
        history = metrics.read(f"{workdir}/metrics.jsonl")
        summary["linear"] = summarize_linear(trained, history, blocks=spec.blocks)
    if config.neighbours.counts:
        accuracy = block_accuracy(
            encoder,
            bank=images.bank(),
            queries=images.feed.evaluation(),
            classes=images.classes,
            kind=config.features,
            normalization=config.data.normalization,
            config=config.neighbours,
            mesh=mesh,
        )
        summary["knn"] = summarize_neighbours(accuracy)
    summary["seconds"] = time.perf_counter() - began
    path = write_summary(summary, workdir=workdir)
    if jax.process_index() == 0:
        print(f"{table(summary)}\n\nsummary: {path}")
    return summary


def open_images(config: ProbeConfig) -> Images:
    """Opens the labelled images.

    Raises:
      ConfigError: they have no classes, not those of the held-out images, or not `config.classes`.
    """
    # Imported here: the train step is also measured where TensorFlow is not installed.
    from beit_jax.data import views

    training, evaluation = labelled_sources(config.data)
    check_class_count(config.classes, training.classes, source=config.data.source)
    feed = functools.partial(
        feed_of, views.classification_views(config.data), config=config.data, training=training
    )
    every_image = dataclasses.replace(config.run, eval_batches=0)
    return Images(
        feed=feed(run=config.run, evaluation=evaluation, repeats=config.data.repeats),
        bank=feed(run=every_image, evaluation=training).evaluation,
        classes=len(training.classes),
        size=len(training),
    )


def feature_spec(config: ProbeConfig, *, layers: int) -> FeatureSpec:
    """The linear probe's features; raises ConfigError for a block that the encoder lacks."""
    return FeatureSpec(
        blocks=chosen_blocks(config.blocks, layers=layers, name="config.blocks"),
        kind=config.features,
        normalization=config.data.normalization,
        erase_probability=config.data.augment.erase_probability,
    )


def check_neighbours(config: KnnConfig, *, layers: int, images: int) -> None:
    """Raises ConfigError for a block that the encoder lacks, or more neighbours than images."""
    chosen_blocks(config.blocks, layers=layers, name="config.neighbours.blocks")
    check(
        max(config.counts, default=0) <= images,
        "config.neighbours.counts",
        f"{config.counts}, but there are {images} training images",
    )


def train_probe(
    encoder: FrozenEncoder,
    images: Images,
    *,
    config: ProbeConfig,
    spec: FeatureSpec,
    mesh: Mesh,
    workdir: str,
) -> loop.Trained:
    """Trains the classifiers of all blocks, or what is left of it."""
    feed = images.feed
    if config.cached_views:
        epochs = config.cached_views * images.size / config.run.batch_size
        feed = stored_feed(
            feed,
            feature_function(encoder, spec=spec, seed=config.run.seed, mesh=mesh),
            steps=min(math.ceil(epochs), config.run.steps),
            blocks=spec.blocks,
        )
    task = probe_task(encoder, spec=spec, classes=config.classes, stored=bool(config.cached_views))
    return loop.train(
        loop.Job(task=task, feed=feed, identity={"run.init_from": start.digest(encoder.params)}),
        # The loop would look for the classifiers in `init_from`.
        run=dataclasses.replace(config.run, init_from=""),
        optimizer_config=config.optimizer,
        config=config,
        workdir=workdir,
        mesh=mesh,
    )


def check_same_probe(config: ProbeConfig, *, workdir: str) -> None:
    """Raises ConfigError where the run's directory holds classifiers of other features."""
    changes = same_run.changes(same_run.recorded(workdir), config)
    for name in ("run.init_from", "features", "blocks"):
        if name in changes:
            was, now = changes[name]["was"], changes[name]["now"]
            raise ConfigError(
                f"config.{name}: was {was!r} for the classifiers in {workdir}, now {now!r};"
                " choose another --workdir"
            )


def summarize_linear(
    trained: loop.Trained, history: list[JsonObject], *, blocks: tuple[int, ...]
) -> JsonObject:
    """The linear probe's part of the summary.

    Args:
      trained: how the run ended.
      history: the lines of its `metrics.jsonl`.
      blocks: probed ones.

    Returns:
      `steps`; `top1`, at the end, and `best_top1`, over all evaluations of the run, by block;
      `best` of all, as the official code reports it: its block, top-1 and step;
      `images_per_second` (None where no step was left to do).
    """
    best: dict[int, float] = {}
    steps: dict[int, int] = {}
    for line in history:
        for block in blocks:
            value = line.get(f"eval_top1_block_{block}")
            if value is not None and value > best.get(block, -1.0):
                best[block], steps[block] = value, line["step"]
    winner = max(best, key=lambda block: best[block])
    return {
        "steps": int(trained.state.step),
        "top1": {str(block): trained.evaluation[f"top1_block_{block}"] for block in blocks},
        "best_top1": {str(block): best[block] for block in blocks},
        "best": {"block": winner, "top1": best[winner], "step": steps[winner]},
        "images_per_second": trained.images_per_second,
    }


def summarize_neighbours(accuracy: Mapping[int, Mapping[int, float]]) -> JsonObject:
    """k-NN's part of the summary: `accuracy` by block and neighbours, and the `best` of all."""
    tried = [(block, count) for block, by_count in accuracy.items() for count in by_count]
    block, count = max(tried, key=lambda pair: accuracy[pair[0]][pair[1]])
    return {
        "accuracy": {
            str(block): {str(count): value for count, value in by_count.items()}
            for block, by_count in accuracy.items()
        },
        "best": {"block": block, "neighbours": count, "accuracy": accuracy[block][count]},
    }


def table(summary: JsonObject) -> str:
    """One row for each block: the linear probe at the end and at its best, k-NN by neighbours."""
    columns: dict[str, dict[str, float]] = {}
    if "linear" in summary:
        columns["linear"] = summary["linear"]["top1"]
        columns["at its best"] = summary["linear"]["best_top1"]
    if "knn" in summary:
        accuracy = summary["knn"]["accuracy"]
        for count in next(iter(accuracy.values())):
            columns[f"{count}-NN"] = {
                block: by_count[count] for block, by_count in accuracy.items()
            }
    blocks = sorted({block for column in columns.values() for block in column}, key=int)
    rows = [
        [block, *(f"{column[block]:.2%}" if block in column else "" for column in columns.values())]
        for block in blocks
    ]
    header = ["block", *columns]
    return "\n" + text_table(rows, header=header, align="r" * len(header), gap="    ")
