"""From a job's config to its task and feed, without what a run does around them.

A job's own `build` counts all held-out tokens and draws pictures, which takes minutes.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from beit_jax.models.segmenter import segmenter
from beit_jax.tasks import classify, pretrain, segment, segment_images, tokenizer
from beit_jax.tasks.feed import check_classes, feed_of, image_feed
from beit_jax.training.job import Feed
from beit_jax.training.state import Task
from beit_jax.types import Json, Params

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

Sources = tuple["Source", "Source"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step needs.

    Attributes:
      task: parameters, loss and metrics.
      feed: batches of training images and of held-out ones.
      classes: that the model scores: tokens or classes; 0 where its loss is no cross-entropy.
      config: the settings, completed with the images' classes.
    """

    task: Task
    feed: Feed
    classes: int
    config: Json


def _pretrain(config: Json, sources: Sources, tokenizer_params: Params | None) -> Parts:
    feed = image_feed(
        config.data,
        run=config.run,
        grid=config.model.grid,
        keys=("image", "token_image", "mask"),
        sources=sources,
    )
    task = pretrain.task_from_config(config, tokenizer_params=tokenizer_params)
    return Parts(task=task, feed=feed, classes=config.tokenizer.vocabulary, config=config)


def _tokenizer(config: Json, sources: Sources, tokenizer_params: Params | None) -> Parts:
    del tokenizer_params
    feed = image_feed(
        config.data,
        run=config.run,
        grid=config.tokenizer.grid,
        keys=("token_image",),
        sources=sources,
    )
    return Parts(task=tokenizer.tokenizer_task(config), feed=feed, classes=0, config=config)


def _classify(config: Json, sources: Sources, tokenizer_params: Params | None) -> Parts:
    del tokenizer_params
    from beit_jax.data import views

    training, evaluation = sources
    check_classes(training, evaluation)
    feed = feed_of(
        views.classification_views(config.data),
        config=config.data,
        run=config.run,
        training=training,
        evaluation=evaluation,
        repeats=config.data.repeats,
    )
    config = classify.with_classes(config, training.classes)
    task = classify.task_from_config(config)
    return Parts(task=task, feed=feed, classes=config.classes, config=config)


def _segment(config: Json, sources: Sources, tokenizer_params: Params | None) -> Parts:
    del sources, tokenizer_params
    images = segment_images.open_images(config.data, labels=config.labels, classes=config.classes)
    config = dataclasses.replace(config, classes=len(images.labels), labels=images.labels)
    model = segmenter(config.model, head=config.head, classes=config.classes)
    feed = segment_images.image_feed(
        images, data=config.data, inference=config.inference, run=config.run
    )
    task = segment.segment_task(model, config=config)
    # The auxiliary head's loss is added.
    return Parts(task=task, feed=feed, classes=0, config=config)


# By `config.task`; a job without a row is checked without a step.
JOBS: dict[str, Callable[[Json, Sources, Params | None], Parts]] = {
    "classify": _classify,
    "pretrain": _pretrain,
    "segment": _segment,
    "tokenizer": _tokenizer,
}


def open_parts(config: Json, *, sources: Sources, tokenizer_params: Params | None) -> Parts:
    """The task and the feed of a job.

    Args:
      config: the job's frozen config, whose `task` is a key of `JOBS`.
      sources: its images.
      tokenizer_params: of the frozen tokenizer, where the job has one.

    Raises:
      ConfigError: settings and images do not fit together.
    """
    return JOBS[config.task](config, sources, tokenizer_params)
