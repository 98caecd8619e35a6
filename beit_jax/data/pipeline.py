"""Batches for one host, as a pure function of (seed, step).

    batches = training_batches(
        source, config=config, grid=14, seed=0, batch_size=2048, start_step=step,
        shard=jax.process_index(), shards=jax.process_count(),
    )
    bad_images = BadImages(source, max_share=config.max_bad_share)
    batch = next(batches)
    bad_images.count(batch)

Image number p = step * batch_size + slot of a run belongs to epoch p // n and is that epoch's
permutation of the n images at p % n; the permutation is computed, not stored. Its augmentation and
its mask are functions of (seed, epoch, index). So a run that resumes at step k needs nothing but
k, and it doesn't matter how many hosts share a batch: each makes its slots, in order. (Not so for a
source that can only be read in order; see `Source.sequence`.)

Memory is bounded: `config.prefetch` batches and an image or two per worker, whatever the source's
size; nothing is cached and no shuffle buffer holds images.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, DataConfig, RunError, check
from beit_jax.data import augment, masking
from beit_jax.data.sources import Element, Source

# Tried in turn for an image that can't be decoded, before a grey one takes its place.
ALTERNATIVES = 5
GREY_SIDE = 64  # pixels

# Bad images only end a run once this many, or a whole epoch, have been read.
MIN_READ = 100

# Sets the random numbers of the order apart from those of augmentation, whose second number is an
# image's index.
ORDER_SALT = 1 << 60

# Held-out images are masked as if they were epoch 0 of a run with this seed.
EVAL_SEED = 20_210_615

Batch = dict[str, np.ndarray]


def training_batches(
    source: Source,
    *,
    config: DataConfig,
    grid: int,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    shard: int = 0,
    shards: int = 1,
    extras: tuple[str, ...] = (),
) -> Iterator[Batch]:
    """One host's part of each global batch, from `start_step` on, without end.

    Args:
      source: the images.
      config: view sizes, augmentation, masks, workers.
      grid: patches along one side of view 1.
      seed: of order, augmentation and masks.
      batch_size: B, of all hosts together.
      start_step: the first batch's step.
      shard, shards: which host this is of how many; it makes b = B / shards images of each batch.
      extras: further fields of the source to deliver: "label", "segmentation".

    Returns:
      An iterator over dicts of
        image: uint8 [b, image_size, image_size, 3], view 1.
        token_image: uint8 [b, token_image_size, token_image_size, 3], view 2.
        mask: bool [b, grid, grid], True where the patch is hidden.
        index: int64 [b], of the image in the source.
        replaced: bool [b], the image could not be decoded and another one, or a grey one, is here.
        label: int32 [b], and segmentation: uint8 [b, image_size, image_size], where asked for.

    Raises:
      ConfigError: the batch does not divide over the hosts, or the masks don't fit the grid.
      ValueError: the source does not have one of the `extras`.
    """
    local = _check(source, config, grid, batch_size, shard=shard, shards=shards, extras=extras)
    seed %= 1 << 31
    size = len(source)

    def finish(elements: tf.data.Dataset) -> tf.data.Dataset:
        views = _training_views(source, config, extras)
        return _finish(elements, views, config=config, grid=grid, batch_size=local)

    if source.sequence is not None:
        steps = size // shards // local
        check(
            steps > 0,
            "batch_size",
            f"{batch_size} is more than the {size // shards * shards} images that {shards} hosts "
            "can read without overlap from a source without random access",
        )

        def epochs() -> Iterator[Batch]:
            for epoch in itertools.count(start_step // steps):
                done = start_step % steps if epoch == start_step // steps else 0
                records = source.sequence(seed=seed, epoch=epoch, shard=shard, shards=shards)
                # Whole batches only: what is left at an epoch's end is not seen in that epoch.
                records = records.take(steps * local).skip(done * local)
                elements = records.map(lambda record, epoch=epoch: _place(record, seed, epoch))
                yield from finish(elements).as_numpy_iterator()

        return epochs()

    def locate(place: tf.Tensor) -> Element:
        """From the place in this host's stream to the image."""
        slot = shard * local + place % local
        number = place // local * batch_size + slot
        epoch = number // size
        index = _permute(number % size, size=size, seed=seed, epoch=epoch)
        return _place({"index": index}, seed, epoch)

    places = tf.data.Dataset.counter(start_step * local, dtype=tf.int64)
    return finish(places.map(locate)).as_numpy_iterator()


def eval_batches(
    source: Source,
    *,
    config: DataConfig,
    grid: int,
    batch_size: int,
    shard: int = 0,
    shards: int = 1,
    extras: tuple[str, ...] = (),
) -> Iterator[Batch]:
    """One host's part of one pass over all images, in a fixed order with fixed masks.

    Every host gets the same number of batches of the same size. Where images run out, the rest of
    the last batch is padding.

    Args:
      source, config, grid, batch_size, shard, shards, extras: as for `training_batches`.

    Returns:
      An iterator over dicts as `training_batches` gives, with
        valid: bool [b], False for padding.

    Raises:
      ConfigError, ValueError: as `training_batches` does.
    """
    local = _check(source, config, grid, batch_size, shard=shard, shards=shards, extras=extras)
    size = len(source)
    views = _eval_views(source, config, extras)

    if source.sequence is not None:
        records = source.sequence(seed=None, epoch=0, shard=shard, shards=shards)
        elements = records.map(lambda record: {**record, "valid": True})
        steps = math.ceil(math.ceil(size / shards) / local)
        padding = tf.nest.map_structure(
            lambda spec: tf.zeros(spec.shape, spec.dtype), elements.element_spec
        )
        elements = elements.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
        elements = elements.take(steps * local)
    else:

        def locate(place: tf.Tensor) -> Element:
            number = place // local * batch_size + shard * local + place % local
            return {"index": tf.minimum(number, size - 1), "valid": number < size}

        elements = tf.data.Dataset.range(math.ceil(size / batch_size) * local).map(locate)

    elements = elements.map(lambda element: _place(element, EVAL_SEED, 0))
    batches = _finish(elements, views, config=config, grid=grid, batch_size=local)
    return batches.as_numpy_iterator()


class TooManyBadImagesError(RunError):
    """More images than `config.data.max_bad_share` allows can't be read or decoded."""


class BadImages:
    """Counts the images that had to be replaced, names each once, and ends a run with too many.

    Counts are this host's own since the start of the process. Where one host raises, the others are
    ended by the cluster.

    Attributes:
      read: images read.
      bad: how many of them were replaced. Each epoch counts again.
    """

    def __init__(self, source: Source, *, max_share: float):
        """Starts at zero; `max_share` in 0..1 is of the images read."""
        self.read = 0
        self.bad = 0
        self._source = source
        self._max_share = max_share
        self._names: dict[int, str] = {}

    def count(self, batch: Batch) -> None:
        """Takes note of a batch (see `training_batches` and `eval_batches`).

        Raises:
          TooManyBadImagesError: the share is too high, or all images are bad; not before 100 images
            or all of a smaller source have been read.
        """
        valid = batch.get("valid")
        self.read += int(batch["replaced"].size if valid is None else valid.sum())
        if batch["replaced"].any():
            self.bad += int(batch["replaced"].sum())
            for index in batch["index"][batch["replaced"]].tolist():
                if index not in self._names:
                    self._names[index] = self._source.name(index)
                    logging.warning("Can't decode %s; replaced it.", self._names[index])
        too_many = self.bad > self._max_share * self.read or self.bad == self.read > 0
        if too_many and self.read >= min(MIN_READ, len(self._source)):
            raise TooManyBadImagesError(
                f"{self.bad} of the {self.read} images read can't be decoded "
                f"({self.bad / self.read:.1%}), more than config.data.max_bad_share allows "
                f"({self._max_share:.1%}); among them "
                + ", ".join(itertools.islice(self._names.values(), 3))
            )


def _check(
    source: Source,
    config: DataConfig,
    grid: int,
    batch_size: int,
    *,
    shard: int,
    shards: int,
    extras: tuple[str, ...],
) -> int:
    """Checks what both kinds of batches need; returns a host's part of the batch size."""
    check(len(source) > 0, "config.data.source", "there are no images")
    if batch_size < 1 or batch_size % shards:
        raise ConfigError(f"batch_size: {batch_size} does not divide over {shards} hosts")
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} is not one of {shards}")
    for field in extras:
        if field not in source.fields:
            raise ValueError(f"this source has no {field!r}, but {', '.join(source.fields)}")
    masking.check_masks(config.mask, grid=grid)
    return batch_size // shards


def _permute(
    index: tf.Tensor,
    *,
    size: int,
    seed: tf.Tensor | int,
    epoch: tf.Tensor,
    turn: tf.Tensor | int = 0,
) -> tf.Tensor:
    """Where `index` (int64 scalar) goes in a permutation of `size` things.

    The permutation is an epoch's order for `turn` 0, unrelated others beyond. It is a small block
    cipher whose key shrinks with `size`: of seeds given as they are only the lowest bits count (few
    images then have just 256 orders), and four rounds, as tf.random.experimental.index_shuffle has
    them, leave traces. Hence a hashed key, and eight.
    """
    order = [tf.cast(part, tf.int64) for part in (seed, epoch, turn)]
    key = tf.random.stateless_uniform(
        [3],
        seed=tf.stack([tf.bitwise.left_shift(order[0], 32) + order[1], ORDER_SALT + order[2]]),
        minval=None,
        maxval=None,
        dtype=tf.int32,
        alg="philox",
    )
    last = tf.constant(size - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=last, rounds=8)


def _place(element: Element, seed: int, epoch: tf.Tensor | int) -> Element:
    """Adds the key that everything random about an image is drawn from: (seed, epoch, index)."""
    key = [tf.cast(part, tf.int64) for part in (seed, epoch, element["index"])]
    return {**element, "key": tf.stack(key)}


def _training_views(
    source: Source, config: DataConfig, extras: tuple[str, ...]
) -> Callable[[Element], Element]:
    def views(element: Element) -> Element:
        loaded = _load_or_replace(source, element)
        image = loaded["image"]
        height, width = tf.unstack(tf.shape(image)[:2])
        seed, epoch, index = tf.unstack(element["key"])
        parameters = augment.draw_parameters(
            # Two numbers seed TensorFlow's generator; seed and epoch are under 2**31.
            tf.stack([tf.bitwise.left_shift(seed, 32) + epoch, index]),
            height=height,
            width=width,
            config=config.augment,
        )
        result = augment.apply_views(
            image,
            parameters=parameters,
            image_size=config.image_size,
            token_image_size=config.token_image_size,
        )
        result |= {name: element[name] for name in ("index", "key")}
        return result | _extras(loaded, parameters=parameters, config=config, extras=extras)

    return views


def _eval_views(
    source: Source, config: DataConfig, extras: tuple[str, ...]
) -> Callable[[Element], Element]:
    def views(element: Element) -> Element:
        loaded = _load_or_replace(source, element)
        image = loaded["image"]
        result = augment.eval_views(
            image, image_size=config.image_size, token_image_size=config.token_image_size
        )
        height, width = tf.unstack(tf.shape(image)[:2])
        parameters = augment.eval_parameters(height=height, width=width)
        result |= {name: element[name] for name in ("index", "key", "valid")}
        result |= _extras(loaded, parameters=parameters, config=config, extras=extras)
        result["replaced"] &= element["valid"]
        return result

    return views


def _extras(
    loaded: Element,
    *,
    parameters: augment.Parameters,
    config: DataConfig,
    extras: tuple[str, ...],
) -> Element:
    result = {"replaced": loaded["replaced"]}
    if "label" in extras:
        result["label"] = loaded["label"]
    if "segmentation" in extras:
        result["segmentation"] = augment.apply_segmentation(
            loaded["segmentation"], parameters=parameters, size=config.image_size
        )
    return result


def _finish(
    elements: tf.data.Dataset,
    views: Callable[[Element], Element],
    *,
    config: DataConfig,
    grid: int,
    batch_size: int,
) -> tf.data.Dataset:
    """Images in parallel, then batches, then masks for a whole batch at once."""
    workers = config.workers or _cores()

    def add_masks(batch: Element) -> Element:
        masks = masking.draw_masks(batch["key"], config=config.mask, grid=grid)
        kept = {name: value for name, value in batch.items() if name != "key"}
        return kept | {"mask": tf.ensure_shape(masks, [batch_size, grid, grid])}

    batches = (
        elements.map(views, num_parallel_calls=workers, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .map(add_masks)
    )
    if config.prefetch:
        batches = batches.prefetch(config.prefetch)
    options = tf.data.Options()
    options.deterministic = True
    # Everything parallel has a fixed size above, so memory doesn't grow with tuning, and the
    # pipeline's threads are its own: one image, one thread.
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    return batches.with_options(options)


def _cores() -> int:
    """Cores this process may use: fewer than the machine has in a container (not told on macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load_or_replace(source: Source, element: Element) -> Element:
    """Loads an image; where that fails another one, the same each time, and at last a grey one.

    Dropping it instead would shift every later batch, and hosts would no longer agree on how many
    there are. A failing operation can't be caught in a graph, but a data set can skip elements that
    fail: hence a data set of one element (0.1 ms an image). The others are tried only if need be.

    Returns:
      What `source.load` gives, with `replaced`, bool scalar.
    """
    request = element if source.sequence is not None else element["index"]
    if source.reliable:
        return {**source.load(request), "replaced": tf.constant(False)}

    def load(request: tf.Tensor | Element, *, replaced: bool) -> Element:
        return {**source.load(request), "replaced": tf.constant(replaced)}

    first = tf.data.Dataset.from_tensors(request).map(lambda each: load(each, replaced=False))
    first = _first_good(first, fields=source.fields)
    if source.sequence is not None:
        return first

    def another() -> Element:
        seed, epoch, index = tf.unstack(element["key"])

        def alternative(turn: tf.Tensor) -> Element:
            other = _permute(index, size=len(source), seed=seed, epoch=epoch, turn=turn)
            return load(other, replaced=True)

        others = tf.data.Dataset.range(1, 1 + ALTERNATIVES).map(alternative)
        return _first_good(others, fields=source.fields)

    return tf.cond(first["replaced"], another, lambda: first)


def _first_good(elements: tf.data.Dataset, *, fields: tuple[str, ...]) -> Element:
    """The first element that can be computed, or a grey image."""
    grey = {
        "image": tf.fill([GREY_SIDE, GREY_SIDE, 3], tf.constant(128, tf.uint8)),
        "label": tf.constant(-1),
        "segmentation": tf.zeros([GREY_SIDE, GREY_SIDE], tf.uint8),
    }
    grey = {name: grey[name] for name in fields} | {"replaced": tf.constant(True)}
    last = tf.data.Dataset.from_tensors(grey)
    return elements.ignore_errors().concatenate(last).take(1).get_single_element()
