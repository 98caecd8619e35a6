"""Batches for one host, as a pure function of (seed, step).

    batches = training_batches(
        source, config=config, views=views, seed=0, batch_size=2048, start_step=step,
        shard=jax.process_index(), shards=jax.process_count(),
    )
    bad_images = BadImages(source, max_share=config.max_bad_share)
    batch = next(batches)
    bad_images.count(batch)

Image number p = step * batch_size + slot of a run belongs to epoch p // n and is that epoch's
permutation of the n images at p % n; the permutation is computed, not stored. Its augmentation and
its mask are functions of (seed, epoch, index). So a run that resumes at step k needs nothing but
k, and it doesn't matter how many hosts share a batch: each makes its slots, in order. (Not so for a
source that can only be read in order; see `Source.sequence`.) With a cycle of K epochs, all but the
mask is a function of epoch mod K, and an epoch is whole batches.

What becomes of an image is the job's own: `Views`, from `data/views.py`.

Memory is bounded: `config.prefetch` batches and an image or two per worker, whatever the source's
size; nothing is cached and no shuffle buffer holds images.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, RunError, SourceConfig, check
from beit_jax.data import service
from beit_jax.data.sources import Element, Source, Window

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """What becomes of an image: where the pipelines of two jobs differ.

    Attributes:
      training: (what the source loads, key) -> tensors of fixed shapes. The key, int64 [3], is
        (seed, epoch, index); everything random is a function of it. In a cycle, its epoch is the
        place in the cycle.
      evaluation: the same without anything random.
      batch: a whole batch, with its keys as `key` [b, 3] -> further tensors of a batch (masks).
      fields: of the source that are needed beside `image`.
      window: key -> what `training` needs of an image, where it is not all of it.
    """

    training: Callable[[Element, tf.Tensor], Element]
    evaluation: Callable[[Element], Element]
    batch: Callable[[Element], Element] = lambda batch: {}
    fields: tuple[str, ...] = ()
    window: Callable[[tf.Tensor], Window] | None = None


def training_batches(
    source: Source,
    *,
    config: SourceConfig,
    views: Views,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    shard: int = 0,
    shards: int = 1,
    repeats: int = 1,
    cycle: int = 0,
) -> Iterator[Batch]:
    """One host's part of each global batch, from `start_step` on, without end.

    Args:
      source: the images.
      config: workers and prefetch.
      views: what becomes of an image.
      seed: of order, augmentation and masks.
      batch_size: B, of all hosts together.
      start_step: the first batch's step.
      shard, shards: which host this is of how many; it makes b = B / shards images of each batch.
      repeats: copies of an image that follow each other, each with its own augmentation. An epoch
        stays as long as it was and sees a part of the images (repeated augmentation, as DeiT's
        sampler does it).
      cycle: K epochs after which images, order, views and replacements of bad images repeat; 0:
        never. What `views.batch` makes (masks) does not repeat. An epoch is `steps_per_epoch` whole
        batches then, what is left over is not seen in it: the batch of a step holds the same
        images at the same places as that of K * steps_per_epoch steps before.

    Returns:
      An iterator over dicts of what `views` makes, and
        index: int64 [b], of the image in the source.
        replaced: bool [b], the image could not be decoded and another one, or a grey one, is here.

    Raises:
      ConfigError: the batch does not divide over the hosts, or the source lacks what is needed.
    """
    local = _check(source, views, batch_size, shard=shard, shards=shards)
    seed %= 1 << 31
    size = len(source)

    def in_cycle(epoch: tf.Tensor | int, length: int = cycle) -> tf.Tensor | int:
        return epoch % length if length else epoch

    def view(element: Element, *, guarded: bool) -> Element:
        run_seed, epoch, index = tf.unstack(element["key"])
        drawn = {**element, "key": tf.stack([run_seed, in_cycle(epoch, cycle * repeats), index])}
        loaded = _load(source, drawn, guarded=guarded, window=views.window)
        kept = {name: element[name] for name in ("index", "key")}
        return views.training(loaded, drawn["key"]) | kept | {"replaced": loaded["replaced"]}

    def finish(elements: tf.data.Dataset, *, guarded: bool) -> tf.data.Dataset:
        made = functools.partial(view, guarded=guarded)
        return _finish(elements, made, views.batch, config=config, batch_size=local)

    if source.sequence is not None:
        check(not config.service, "config.data.service", "this source can only be read in order")
        steps = steps_per_epoch(source, batch_size=batch_size, shards=shards)
        check(
            steps > 0,
            "batch_size",
            f"{batch_size} is more than the {size // shards * shards} images that {shards} hosts "
            "can read without overlap from a source without random access",
        )

        def copies(record: Element, epoch: int) -> tf.data.Dataset:
            turns = tf.data.Dataset.range(repeats)
            return turns.map(lambda turn: _place(record, seed, epoch * repeats + turn))

        def epochs(start: int, *, guarded: bool) -> Iterator[Batch]:
            for epoch in itertools.count(start // steps):
                done = start % steps if epoch == start // steps else 0
                records = source.sequence(
                    seed=seed, epoch=in_cycle(epoch), shard=shard, shards=shards
                )
                elements = records.flat_map(lambda record, epoch=epoch: copies(record, epoch))
                # Whole batches only: what is left at an epoch's end is not seen in that epoch.
                elements = elements.take(steps * local).skip(done * local)
                yield from finish(elements, guarded=guarded).as_numpy_iterator()

        return _unguarded_first(epochs, start=start_step)

    length = size
    if cycle:
        length = batch_size * steps_per_epoch(source, batch_size=batch_size, shards=shards)
        check(length > 0, "config.run.batch_size", f"{batch_size} is more than all {size} images")

    def locate(place: tf.Tensor) -> Element:
        """From the place in this host's stream to the image."""
        slot = shard * local + place % local
        number = place // local * batch_size + slot
        epoch, number = number // length, number % length
        index = _permute(number // repeats, size=size, seed=seed, epoch=in_cycle(epoch))
        return _place({"index": index}, seed, epoch * repeats + number % repeats)

    def of_steps(steps: tf.data.Dataset, *, guarded: bool = True) -> tf.data.Dataset:
        slots = steps.flat_map(lambda step: tf.data.Dataset.range(step * local, (step + 1) * local))
        return finish(slots.map(locate), guarded=guarded)

    if config.service:
        check(
            source.portable,
            "config.data.service",
            "this source is read by Python, which no service can do for it",
        )
        check(config.workers > 0, "config.data.workers", "say how many cores a service has")
        mine = service.assigned(config.service, shard=shard, shards=shards)
        return service.batches(of_steps, addresses=mine, start_step=start_step)

    def stream(start: int, *, guarded: bool) -> Iterator[Batch]:
        steps = tf.data.Dataset.counter(start, dtype=tf.int64)
        return of_steps(steps, guarded=guarded).as_numpy_iterator()

    return _unguarded_first(stream, start=start_step)


def steps_per_epoch(source: Source, *, batch_size: int, shards: int) -> int:
    """Whole batches in an epoch, where epochs are whole batches.

    Args:
      source: the training images.
      batch_size: of all hosts together.
      shards: hosts; only a source without random access is cut between them.
    """
    if source.sequence is not None:
        return len(source) // shards // (batch_size // shards)
    return len(source) // batch_size


def eval_batches(
    source: Source,
    *,
    config: SourceConfig,
    views: Views,
    batch_size: int,
    shard: int = 0,
    shards: int = 1,
) -> Iterator[Batch]:
    """One host's part of one pass over all images, in a fixed order with fixed masks.

    Every host gets the same number of batches of the same size. Where images run out, the rest of
    the last batch is padding.

    Args:
      source, config, views, batch_size, shard, shards: as for `training_batches`.

    Returns:
      An iterator over dicts as `training_batches` gives, with
        valid: bool [b], False for padding.

    Raises:
      ConfigError: as `training_batches` does.
    """
    local = _check(source, views, batch_size, shard=shard, shards=shards)
    size = len(source)

    def view(element: Element, *, guarded: bool) -> Element:
        loaded = _load(source, element, guarded=guarded)
        kept = {name: element[name] for name in ("index", "key", "valid")}
        replaced = loaded["replaced"] & element["valid"]
        return views.evaluation(loaded) | kept | {"replaced": replaced}

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

    def stream(start: int, *, guarded: bool) -> Iterator[Batch]:
        made = functools.partial(view, guarded=guarded)
        rest = elements.skip(start * local)
        finished = _finish(rest, made, views.batch, config=config, batch_size=local)
        return finished.as_numpy_iterator()

    return _unguarded_first(stream, start=0)


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


def _unguarded_first(stream: Callable[..., Iterator[Batch]], *, start: int) -> Iterator[Batch]:
    """`stream(start, guarded=False)`, and from the first batch that fails on, with guards.

    A guard takes a sixth of an image's time, and most data sets need none.
    """
    step = start
    batches = stream(start, guarded=False)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            logging.info("An image can't be read; from here on each is guarded. %s", error.message)
            break
        yield batch
        step += 1
    yield from stream(step, guarded=True)


def _check(source: Source, views: Views, batch_size: int, *, shard: int, shards: int) -> int:
    """Checks what both kinds of batches need; returns a host's part of the batch size."""
    check(len(source) > 0, "config.data.source", "there are no images")
    if batch_size < 1 or batch_size % shards:
        raise ConfigError(f"batch_size: {batch_size} does not divide over {shards} hosts")
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} is not one of {shards}")
    for field in views.fields:
        check(
            field in source.fields,
            "config.data.source",
            f"this source has no {field!r} for its images, but {', '.join(source.fields)}",
        )
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


def _finish(
    elements: tf.data.Dataset,
    view: Callable[[Element], Element],
    batch_view: Callable[[Element], Element],
    *,
    config: SourceConfig,
    batch_size: int,
) -> tf.data.Dataset:
    """Images in parallel, then batches, then what is made of a whole batch at once."""
    workers = config.workers or cores()

    def add(batch: Element) -> Element:
        kept = {name: value for name, value in batch.items() if name != "key"}
        return kept | batch_view(batch)

    batches = (
        elements.map(view, num_parallel_calls=workers, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .map(add)
    )
    if config.prefetch:
        batches = batches.prefetch(config.prefetch)
    return batches.with_options(fixed_options(workers))


def fixed_options(workers: int) -> tf.data.Options:
    """In order, with `workers` threads of the pipeline's own: one image, one thread.

    Everything parallel must have a fixed size, so that memory doesn't grow with tuning.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    return options


def cores() -> int:
    """Cores this process may use: fewer than the machine has in a container (not told on macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load(
    source: Source,
    element: Element,
    *,
    guarded: bool,
    window: Callable[[tf.Tensor], Window] | None = None,
) -> Element:
    """Loads an image. If guarded and it fails: another one, the same each time; at last a grey one.

    Dropping it instead would shift every later batch, and hosts would no longer agree on how many
    there are. A failing operation can't be caught in a graph, but a data set can skip elements that
    fail: hence a data set of one element (0.6 ms an image). The others are tried only if need be.

    Returns:
      What `source.load` gives, with `replaced`, bool scalar.
    """
    request = element if source.sequence is not None else element["index"]

    def load(request: tf.Tensor | Element, *, replaced: bool) -> Element:
        part = window(element["key"]) if window else None
        return {**source.load(request, window=part), "replaced": tf.constant(replaced)}

    if source.reliable or not guarded:
        return load(request, replaced=False)

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
