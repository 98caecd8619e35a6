"""Images from their source to this host's batches, for every job that reads images."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np
from absl import logging

from beit_jax.config import DataConfig, LabelledDataConfig, RunConfig, SourceConfig, check
from beit_jax.distributed import cluster
from beit_jax.drawing import sheets
from beit_jax.training.job import Feed
from beit_jax.types import HostBatch

if TYPE_CHECKING:
    # At run time imported inside functions: a step also runs where TensorFlow is not installed.
    from beit_jax.data.pipeline import Views
    from beit_jax.data.sources import Source

# Images one by one, each a batch of 1, and how many make this host's part of a batch → batches.
# Every host reads as many images.
Pack: TypeAlias = Callable[[Iterator[HostBatch], int], Iterator[HostBatch]]


def image_sources(config: SourceConfig) -> tuple["Source", "Source"]:
    """Opens the training and the held-out images, and logs how many there are."""
    from beit_jax.data import sources

    training = sources.open_source(config, training=True)
    evaluation = sources.open_source(config, training=False)
    other = f" of {config.eval_source}" if config.eval_source else ""
    logging.info(
        "images of %s: %s to train on, %s%s held out",
        config.source,
        f"{len(training):,}",
        f"{len(evaluation):,}",
        other,
    )
    return training, evaluation


def image_feed(
    config: DataConfig,
    *,
    run: RunConfig,
    grid: int,
    keys: tuple[str, ...],
    sources: tuple["Source", "Source"] | None = None,
) -> Feed:
    """This host's training and held-out batches, for pre-training and the tokenizer.

    Args:
      config: the source and the views.
      run: the seed, the global batch and how much to evaluate.
      grid: patches along one side, for the masks.
      keys: the parts of a batch that the job needs; nothing else is made. Held-out batches also
        have `valid`.
      sources: from `image_sources`, where they are already open.
    """
    from beit_jax.data import views

    training, evaluation = sources or image_sources(config)
    return feed_of(
        views.pretraining_views(config, grid=grid, keys=keys),
        config=config,
        run=run,
        training=training,
        evaluation=evaluation,
        cycle=config.augmentation_cycle,
    )


def labelled_feed(config: LabelledDataConfig, *, run: RunConfig) -> tuple[Feed, tuple[str, ...]]:
    """Batches of `image` and `label`, and the names of the classes.

    Raises:
      ConfigError: the images have no classes, or the held-out images have other classes.
    """
    from beit_jax.data import views

    training, evaluation = labelled_sources(config)
    feed = feed_of(
        views.classification_views(config),
        config=config,
        run=run,
        training=training,
        evaluation=evaluation,
        repeats=config.repeats,
    )
    return feed, training.classes


def labelled_sources(config: LabelledDataConfig) -> tuple["Source", "Source"]:
    """Opens training and held-out images, which have the same classes.

    Raises:
      ConfigError: the images have no classes, or the held-out images have other classes.
    """
    training, evaluation = image_sources(config)
    check_classes(training, evaluation)
    return training, evaluation


def check_class_count(wanted: int, classes: tuple[str, ...], *, source: str) -> None:
    """Raises ConfigError where `config.classes` is neither 0 nor what the images have."""
    check(
        wanted in (0, len(classes)), "config.classes", f"{wanted}, but {source} has {len(classes)}"
    )


def check_classes(training: "Source", evaluation: "Source") -> None:
    """Raises ConfigError unless both sources have the same, non-empty list of classes.

    A label is an index into that list.
    """
    check(
        bool(training.classes),
        "config.data.source",
        "its images have no classes; a folder needs a folder for every class and no images beside",
    )
    trained, held_out = set(training.classes), set(evaluation.classes)
    check(
        training.classes == evaluation.classes,
        "config.data.eval_source",
        "its classes are not those of config.data.source; only there:"
        f" {', '.join(sorted(trained - held_out)[:5]) or 'none'}; only here:"
        f" {', '.join(sorted(held_out - trained)[:5]) or 'none'}",
    )


# Long because its closures are the two streams of batches, which share what is opened here.
def feed_of(
    views: "Views",
    *,
    config: SourceConfig,
    run: RunConfig,
    training: "Source",
    evaluation: "Source",
    repeats: int = 1,
    cycle: int = 0,
    pack: Pack | None = None,
) -> Feed:
    """This host's batches of two sources.

    Args:
      views: what becomes of an image.
      config, run: how images are read; the global batch and how much to evaluate.
      training, evaluation: the images.
      repeats, cycle: as in `pipeline.training_batches`.
      pack: makes a held-out batch of images of different sizes, which are read one by one.
    """
    from beit_jax.data import pipeline
    from beit_jax.data.bad_images import BadImages

    counts = [len(training), len(evaluation)]
    cluster.check_agreement("images of config.data.source and eval_source", counts)
    bad = BadImages(training, max_share=config.max_bad_share)
    bad_held_out = BadImages(evaluation, max_share=config.max_bad_share, evaluation=True)
    shared = {
        "config": config,
        "views": views,
        "shard": jax.process_index(),
        "shards": jax.process_count(),
    }

    def training_batches(start_step: int) -> Iterator[HostBatch]:
        batches = pipeline.training_batches(
            training,
            **shared,
            batch_size=run.batch_size,
            seed=run.seed,
            start_step=start_step,
            repeats=repeats,
            cycle=cycle,
        )
        for batch in batches:
            bad.count(batch)
            yield _only_views(batch)

    local = run.batch_size // jax.process_count()
    # What is read at once: a batch, or an image on every host.
    at_once = run.batch_size if pack is None else jax.process_count()
    reads = run.eval_batches * (1 if pack is None else local)

    def held_out() -> Iterator[HostBatch]:
        batches = pipeline.eval_batches(evaluation, **shared, batch_size=at_once)
        for batch in itertools.islice(batches, reads or None):
            bad_held_out.count(batch)
            # An image that cannot be decoded is replaced by another, which must not count twice.
            batch["valid"] = batch["valid"] & ~batch["replaced"]
            yield _only_views(batch)

    def eval_batches() -> Iterable[HostBatch]:
        bad_held_out.start_pass()
        yield from held_out() if pack is None else pack(held_out(), local)
        bad_held_out.end_pass()

    return Feed(
        training=training_batches,
        evaluation=eval_batches,
        metrics=bad.metrics,
        counts=dict(zip(("data.source", "data.eval_source"), counts, strict=True)),
    )


def _only_views(batch: HostBatch) -> HostBatch:
    """A batch without the pipeline's bookkeeping."""
    bookkeeping = ("index", "replaced", "by_pillow")
    return {key: value for key, value in batch.items() if key not in bookkeeping}


def draw_first_batch(feed: Feed, draw: Callable[[HostBatch], np.ndarray], *, workdir: str) -> Feed:
    """Has process 0 write `first_batch.png` when the first batch is read: what the model is given.

    Args:
      feed: the data.
      draw: this host's part of a batch → uint8 `[h, w, 3]`.
      workdir: the run's directory.
    """

    def training(start_step: int) -> Iterator[HostBatch]:
        batches = feed.training(start_step)
        first = next(batches)
        if jax.process_index() == 0:
            sheets.save_png(f"{workdir}/first_batch.png", draw(first))
        yield first
        yield from batches

    return dataclasses.replace(feed, training=training)


def held_out_sample(
    config: DataConfig, evaluation: "Source", *, grid: int, keys: tuple[str, ...], count: int
) -> HostBatch:
    """Held-out images for pictures, evenly spaced over all of them; the same on every host.

    The first few of a sorted folder are often all of one class.

    Args:
      config: the views.
      evaluation: the held-out images.
      grid: patches along one side, for the masks.
      keys: the parts of a batch that are needed.
      count: at most so many images.

    Returns:
      The `keys`, `[n, ...]` with 1 ≤ n ≤ `count`. What can't be decoded is left out, except where
      that would leave nothing.
    """
    from beit_jax.data import pipeline, sources, views

    batches = pipeline.eval_batches(
        sources.spread(evaluation, count=count),
        config=config,
        views=views.pretraining_views(config, grid=grid, keys=keys),
        batch_size=count,
    )
    batch = next(batches)
    good = batch["valid"] & ~batch["replaced"]
    shown = good if good.any() else batch["valid"]
    return {name: values[shown] for name, values in batch.items() if name in keys}
