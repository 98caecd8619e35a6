"""Images with label maps, from their source to batches and pictures, for segmentation."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from beit_jax.config import ConfigError, InferenceConfig, RunConfig, SegmentDataConfig, check
from beit_jax.config.parse import shown
from beit_jax.config.segment import LARGEST_CLASSES
from beit_jax.distributed import cluster
from beit_jax.drawing import class_maps
from beit_jax.models.functional import Functional
from beit_jax.segmentation import sliding, windows
from beit_jax.tasks.feed import feed_of, image_sources
from beit_jax.training.job import Feed, Picture, picture_of
from beit_jax.training.state import TrainState
from beit_jax.types import Batch, HostBatch, Params

if TYPE_CHECKING:
    # At run time imported inside functions: a step also runs where TensorFlow is not installed.
    from beit_jax.data.sources import Source

PICTURES = 8  # images in a picture
_AHEAD = 2  # batches of held-out images that are cut ahead of the device
A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Open sources.

    Attributes:
      training, evaluation: the images.
      labels: names of the classes.
    """

    training: "Source"
    evaluation: "Source"
    labels: tuple[str, ...]


def open_images(
    data: SegmentDataConfig, *, labels: tuple[str, ...], classes: int
) -> LabelledImages:
    """Opens images with label maps, and completes the names of the classes.

    Args:
      data: the sources.
      labels: `config.labels`; () takes the source's names, or numbers.
      classes: `config.classes`; 0: as many as there are names.

    Raises:
      ConfigError: the images have no label maps, their classes are unknown or not these, or some of
        the first maps have a label beyond the classes.
    """
    from beit_jax.data import label_maps

    training, evaluation = image_sources(data)
    held_out = "eval_source" if data.eval_source else "source"
    opened = (("source", training), (held_out, evaluation))
    for setting, source in opened:
        check(
            "segmentation" in source.fields,
            f"config.data.{setting}",
            "its images have no label maps; pairs:FOLDER reads FOLDER/images and FOLDER/labels",
        )
    names = labels or training.segmentation_classes or tuple(f"class {i}" for i in range(classes))
    check(
        bool(names),
        "config.classes",
        "0, but nothing names the classes (config.labels, or classes.txt): say how many there are",
    )
    twice = sorted({name for name in names if names.count(name) > 1})
    check(
        not twice,
        "config.labels" if labels else "config.data.source",
        f"two classes have the same name: {', '.join(map(shown, twice[:5]))}",
    )
    check(
        classes in (0, len(names)), "config.classes", f"{classes}, but there are {len(names)} names"
    )
    check(
        len(names) <= LARGEST_CLASSES,
        "config.classes",
        f"{len(names)} are more than labels of 8 bits can tell apart, {LARGEST_CLASSES}",
    )
    check(
        evaluation.segmentation_classes in ((), training.segmentation_classes),
        "config.data.eval_source",
        "its classes have other names than those of config.data.source",
    )
    for setting, source in opened:
        label_maps.check_labels(
            source, config=data, classes=len(names), setting=f"config.data.{setting}"
        )
    return LabelledImages(training=training, evaluation=evaluation, labels=tuple(names))


def check_inference(data: SegmentDataConfig, inference: InferenceConfig) -> None:
    """Raises ConfigError where windows of the crop's size would not do; for `__post_init__`."""
    try:
        windows.check_windows(inference, crop=data.image_size)
    except ConfigError as error:
        raise ConfigError(f"inference.{error}") from None


def image_feed(
    images: LabelledImages, *, data: SegmentDataConfig, inference: InferenceConfig, run: RunConfig
) -> Feed:
    """Batches of crops to train on; held-out images whole, as windows and tiles."""
    from beit_jax.data import views

    rooms = windows.Rooms(tile=inference.tile, agree=_largest_of_all_hosts)
    return feed_of(
        views.segmentation_views(data, classes=len(images.labels)),
        config=data,
        run=run,
        training=images.training,
        evaluation=images.evaluation,
        pack=functools.partial(_packed, data=data, inference=inference, rooms=rooms),
    )


def _largest_of_all_hosts(needed: list[int]) -> list[int]:
    everywhere = cluster.gather("windows of held-out images", needed)
    return [max(numbers) for numbers in zip(*everywhere, strict=True)]


def _packed(
    singles: Iterator[HostBatch],
    local: int,
    *,
    data: SegmentDataConfig,
    inference: InferenceConfig,
    rooms: windows.Rooms,
) -> Iterator[HostBatch]:
    """Groups held-out images into batches; see `feed.Pack`.

    Args:
      singles: batches of one `image`, its `segmentation` and `valid`.
      local: images of a batch on this host; the last batch is filled with padding.
      data: how large images are made.
      inference: how they are cut.
      rooms: the batches' shape.
    """

    def one(single: HostBatch) -> tuple[windows.Prepared, np.ndarray | None]:
        labels = single["segmentation"][0] if single["valid"][0] else None
        return _prepared(single["image"][0], data=data, inference=inference), labels

    def pack(group: list[tuple[windows.Prepared, np.ndarray | None]]) -> HostBatch:
        images, labels = zip(*group, strict=True)
        return windows.pack(images, labels, images=local, crop=data.image_size, rooms=rooms)

    group = []
    for image in _ahead(one, singles, count=_AHEAD * local, workers=data.workers):
        group.append(image)
        if len(group) == local:
            yield pack(group)
            group = []
    if group:
        yield pack(group)


def _prepared(
    image: np.ndarray, *, data: SegmentDataConfig, inference: InferenceConfig
) -> windows.Prepared:
    return windows.prepare_image(
        image, config=inference, crop=data.image_size, shorter=data.shorter, longer=data.longer
    )


def _ahead(
    function: Callable[[A], B], items: Iterator[A], *, count: int, workers: int
) -> Iterator[B]:
    """`map` in threads, in order, at most `count` results ahead."""
    with concurrent.futures.ThreadPoolExecutor(workers or None) as pool:
        waiting: collections.deque[concurrent.futures.Future[B]] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def first_batch_picture(batch: HostBatch, *, labels: tuple[str, ...]) -> np.ndarray:
    """Draws crops and their maps as they come from the host, without padding: uint8 `[h, w, 3]`."""
    count = min(PICTURES, len(batch["image"]))
    sizes = batch["size"][:count]
    columns = {
        caption: [each[:h, :w] for each, (h, w) in zip(batch[field][:count], sizes, strict=True)]
        for caption, field in (("image", "image"), ("labels", "segmentation"))
    }
    return class_maps.sheet(columns, names=labels)


def held_out_picture(
    images: LabelledImages,
    model: Functional,
    *,
    data: SegmentDataConfig,
    inference: InferenceConfig,
) -> Picture:
    """A picture of what a train state makes of some held-out images, evenly spread over the set.

    Args:
      images: open sources.
      model: from `segmenter`.
      data, inference: how images are cut.
    """
    rooms = windows.Rooms(tile=inference.tile)
    classify = jax.jit(
        functools.partial(
            _classes,
            model=model,
            normalization=data.normalization,
            passes=windows.passes(inference),
            tile=inference.tile,
        )
    )

    @functools.cache
    def sample() -> list[HostBatch]:
        return _spread(images, data=data)

    def draw(weights: Params) -> np.ndarray:
        found = []
        for each in sample():
            prepared = _prepared(each["image"], data=data, inference=inference)
            batch = windows.pack([prepared], images=1, crop=data.image_size, rooms=rooms)
            tiles = np.asarray(classify(weights, batch))
            found.append(windows.assemble(tiles[0], size=prepared.size))
        columns = {
            "image": [each["image"] for each in sample()],
            "labels": [each["segmentation"] for each in sample()],
            "prediction": found,
        }
        return class_maps.sheet(columns, names=images.labels)

    return picture_of(draw, of=_weights)


def _weights(train_state: TrainState) -> Params:
    return {"params": train_state.params, "variables": train_state.variables}


def _classes(
    weights: Params,
    batch: Batch,
    *,
    model: Functional,
    normalization: str,
    passes: int,
    tile: int,
) -> jax.Array:
    return sliding.predict(
        functools.partial(model.apply, weights["params"], variables=weights["variables"]),
        batch,
        normalization=normalization,
        passes=passes,
        tile=tile,
    )


def _spread(images: LabelledImages, *, data: SegmentDataConfig) -> list[HostBatch]:
    """Some held-out images with their maps; those that can't be used are left out."""
    import tensorflow as tf

    from beit_jax.data import label_maps

    source, found = images.evaluation, []
    for _, request in label_maps.sample(source, count=PICTURES):
        try:
            loaded = label_maps.with_classes(
                source.load(request), config=data, classes=len(images.labels)
            )
        except (tf.errors.OpError, UnicodeDecodeError):
            continue
        found.append({name: loaded[name].numpy() for name in ("image", "segmentation")})
    return found
