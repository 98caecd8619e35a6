"""Images from their source to this host's batches, as every image job reads them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from beit_jax.config import DataConfig, LabelledDataConfig, RunConfig, SourceConfig, check
from beit_jax.distributed import cluster
from beit_jax.training import loop

if TYPE_CHECKING:
    # Elsewhere inside the functions: a job's step is measured where TensorFlow is not installed.
    from beit_jax.data.pipeline import Views
    from beit_jax.data.sources import Source


def image_sources(config: SourceConfig) -> tuple["Source", "Source"]:
    """Training and held-out images."""
    from beit_jax.data import sources

    return (
        sources.open_source(config, training=True),
        sources.open_source(config, training=False),
    )


def image_feed(
    config: DataConfig,
    *,
    run: RunConfig,
    grid: int,
    keys: tuple[str, ...],
    sources: tuple["Source", "Source"] | None = None,
) -> loop.Feed:
    """Training and held-out batches of this host, for pre-training and the tokenizer.

    Args:
      config: the source and the views.
      run: the seed, the global batch and how much to evaluate.
      grid: patches along one side, for the masks.
      keys: what the job takes to the devices, nothing else is made; held-out batches also have
        `valid`.
      sources: of `image_sources`, where they are already open.
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


def labelled_feed(config: LabelledDataConfig, *, run: RunConfig) -> tuple[loop.Feed, tuple]:
    """Batches of `image` and `label`, and the names of the classes.

    Raises:
      ConfigError: the images have no classes, or training and held-out images have different ones.
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
    """Training and held-out images of the same classes.

    Raises:
      ConfigError: the images have no classes, or training and held-out images have different ones.
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
    """Labels are places in the list of classes: both sources must have the same list."""
    check(
        bool(training.classes),
        "config.data.source",
        "its images have no classes; a folder needs a folder for each class, and no images beside",
    )
    ours, theirs = set(training.classes), set(evaluation.classes)
    check(
        training.classes == evaluation.classes,
        "config.data.eval_source",
        "its classes are not those of config.data.source; only there:"
        f" {', '.join(sorted(ours - theirs)[:5]) or 'none'}; only here:"
        f" {', '.join(sorted(theirs - ours)[:5]) or 'none'}",
    )


def feed_of(
    views: "Views",
    *,
    config: SourceConfig,
    run: RunConfig,
    training: "Source",
    evaluation: "Source",
    repeats: int = 1,
    cycle: int = 0,
) -> loop.Feed:
    """What `views` make of two sources, for this host; the rest as `pipeline.training_batches`."""
    from beit_jax.data import pipeline
    from beit_jax.data.bad_images import BadImages

    counts = [len(training), len(evaluation)]
    cluster.check_agreement("images of config.data.source and eval_source", counts)
    bad = BadImages(training, max_share=config.max_bad_share)
    shared = {
        "config": config,
        "views": views,
        "batch_size": run.batch_size,
        "shard": jax.process_index(),
        "shards": jax.process_count(),
    }
    bookkeeping = ("index", "replaced")

    def only_views(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value for key, value in batch.items() if key not in bookkeeping}

    def training_batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        batches = pipeline.training_batches(
            training,
            **shared,
            seed=run.seed,
            start_step=start_step,
            repeats=repeats,
            cycle=cycle,
        )
        for batch in batches:
            bad.count(batch)
            yield only_views(batch)

    def eval_batches() -> Iterable[dict[str, np.ndarray]]:
        for number, batch in enumerate(pipeline.eval_batches(evaluation, **shared)):
            if run.eval_batches and number == run.eval_batches:
                return
            # What can't be decoded counts for nothing: another image stands in its place.
            batch["valid"] = batch["valid"] & ~batch["replaced"]
            yield only_views(batch)

    return loop.Feed(
        training=training_batches,
        evaluation=eval_batches,
        metrics=lambda: {"replaced_images": float(bad.bad)},
    )


def with_first(
    training: Callable[[int], Iterator[dict[str, np.ndarray]]],
    look: Callable[[dict[str, np.ndarray]], None],
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """`training`, whose first batch process 0 looks at when it is read."""

    def shown(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        batches = training(start_step)
        first = next(batches)
        if jax.process_index() == 0:
            look(first)
        yield first
        yield from batches

    return shown


def first_images(
    batches: Iterable[dict[str, np.ndarray]], *, count: int
) -> dict[str, np.ndarray] | None:
    """The first held-out images of this host, for pictures."""
    for batch in batches:
        valid = batch["valid"].astype(bool)
        return {name: values[valid][:count] for name, values in batch.items()}
    return None
