"""Batches for one host, as a pure function of (seed, step).

    batches = training_batches(
        source, config=config, views=views, seed=0, batch_size=2048, start_step=step,
        shard=jax.process_index(), shards=jax.process_count(),
    )
    batch = next(batches)

Image number p = step * batch_size + slot of a run belongs to epoch p // n, and is the image at
p % n in that epoch's permutation of the n images; the permutation is computed, not stored. Its
augmentation and its mask are functions of (seed, epoch, index). A run that resumes at step k
therefore needs only k, and the number of hosts that share a batch makes no difference: each host
fills its slots, in order. (The exception is a source that can only be read in order, see
`Source.sequence`.) With a cycle of K epochs, everything but the mask is a function of epoch mod K,
and an epoch consists of whole batches.

The job decides what becomes of an image: `Views`, built in `data/views.py`.

Memory is bounded by `config.prefetch` batches and an image or two per worker, of at most
`config.max_pixels`, whatever the source's size. Nothing is cached, and no shuffle buffer holds
images.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator

import tensorflow as tf
from absl import logging

from beit_jax.config import ConfigError, SourceConfig, check
from beit_jax.data import service
from beit_jax.data.decode import Window
from beit_jax.data.loading import load_image
from beit_jax.data.order import permute, with_key
from beit_jax.data.sources import Element, Source
from beit_jax.types import HostBatch

# Held-out images are masked as if they were epoch 0 of a run with this seed.
EVAL_SEED = 20_210_615
_QUOTED = 160  # characters of TensorFlow's message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """What becomes of an image: where the pipelines of two jobs differ.

    Attributes:
      training: a function from what the source loads and a key to tensors of fixed shapes. The key,
        int64 [3], is (seed, epoch, index), and everything random is a function of it. In a cycle of
        K epochs, its epoch is that of the cycle.
      evaluation: the same without anything random.
      batch: a function from a whole batch, with its keys as `key` [b, 3], to further tensors of the
        batch, such as masks.
      fields: fields of the source that are needed besides `image`.
      window: a function from the key to the part of the image that `training` needs, where that is
        not all of it.
      accept: a function from what the source loads to what `training` and `evaluation` are given;
        where it fails, the image counts as one that can't be decoded, and is replaced.
    """

    training: Callable[[Element, tf.Tensor], Element]
    evaluation: Callable[[Element], Element]
    batch: Callable[[Element], Element] = lambda batch: {}
    fields: tuple[str, ...] = ()
    window: Callable[[tf.Tensor], Window] | None = None
    accept: Callable[[Element], Element] | None = None


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
) -> Iterator[HostBatch]:
    """One host's part of each global batch, from `start_step` on, without end.

    Args:
      source: the images.
      config: workers and prefetch.
      views: what becomes of an image.
      seed: of order, augmentation and masks.
      batch_size: B, of all hosts together.
      start_step: the first batch's step.
      shard, shards: this host's index and the number of hosts; each makes b = B / shards images of
        every batch.
      repeats: consecutive copies of an image, each with its own augmentation. An epoch keeps its
        length and sees only a part of the images (repeated augmentation, as in DeiT's sampler).
      cycle: K epochs after which images, order, views and replacements of bad images repeat; 0 for
        never. What `views.batch` makes (masks) does not repeat. An epoch then consists of
        `steps_per_epoch` whole batches, and the images left over are not seen in it: a step's batch
        holds the same images in the same slots as that of K * steps_per_epoch steps before.

    Returns:
      An iterator over dicts of what `views` makes, and
        index: int64 [b], of the image in the source.
        replaced: bool [b], the image could not be decoded and another one, or a grey one, is here.
        by_pillow: bool [b], what is here was decoded by Pillow, since TensorFlow can't.

    Raises:
      ConfigError: the batch does not divide over the hosts, or the source lacks what is needed.
    """
    stream = _Training(
        source=source,
        config=config,
        views=views,
        seed=seed % (1 << 31),
        batch_size=batch_size,
        local=_check(source, views, batch_size, shard=shard, shards=shards),
        shard=shard,
        shards=shards,
        repeats=repeats,
        cycle=cycle,
    )
    if source.sequence is not None:
        return stream.in_order(source.sequence, start_step=start_step)
    return stream.by_index(start_step=start_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """One host's stream of training batches.

    Attributes:
      local: images of each batch that this host makes.
      Others: as for `training_batches`; `seed` is under 2**31.
    """

    source: Source
    config: SourceConfig
    views: Views
    seed: int
    batch_size: int
    local: int
    shard: int
    shards: int
    repeats: int
    cycle: int

    def in_order(
        self, sequence: Callable[..., tf.data.Dataset], *, start_step: int
    ) -> Iterator[HostBatch]:
        """Batches of a source that can only be read from front to back."""
        check(
            not self.config.service, "config.data.service", "this source can only be read in order"
        )
        steps = self._steps_per_epoch()
        check(
            steps > 0,
            "batch_size",
            f"{self.batch_size} is more than the"
            f" {len(self.source) // self.shards * self.shards} images that {self.shards} hosts "
            "can read without overlap from a source without random access",
        )

        def copies(record: Element, epoch: int) -> tf.data.Dataset:
            return tf.data.Dataset.range(self.repeats).map(
                lambda copy: with_key(record, seed=self.seed, epoch=epoch * self.repeats + copy)
            )

        def batches(start: int, *, guarded: bool) -> Iterator[HostBatch]:
            for epoch in itertools.count(start // steps):
                done = start % steps if epoch == start // steps else 0
                records = sequence(
                    seed=self.seed,
                    epoch=self._in_cycle(epoch),
                    shard=self.shard,
                    shards=self.shards,
                )
                elements = records.flat_map(lambda record, epoch=epoch: copies(record, epoch))
                # Whole batches only: the images left at an epoch's end are not seen in that epoch.
                elements = elements.take(steps * self.local).skip(done * self.local)
                yield from self._batches(elements, guarded=guarded).as_numpy_iterator()

        return _unguarded_first(batches, start=start_step)

    def by_index(self, *, start_step: int) -> Iterator[HostBatch]:
        """Batches of a source with random access; made by services where there are any."""
        epoch_size = len(self.source)
        if self.cycle:
            epoch_size = self.batch_size * self._steps_per_epoch()
            check(
                epoch_size > 0,
                "config.run.batch_size",
                f"{self.batch_size} is more than all {len(self.source)} images",
            )

        def of_steps(steps: tf.data.Dataset, *, guarded: bool = True) -> tf.data.Dataset:
            positions = steps.flat_map(
                lambda step: tf.data.Dataset.range(step * self.local, (step + 1) * self.local)
            )
            elements = positions.map(functools.partial(self._locate, epoch_size=epoch_size))
            return self._batches(elements, guarded=guarded)

        if self.config.service:
            check(
                self.source.portable,
                "config.data.service",
                "this source is read by Python, which no service can do for it",
            )
            check(
                self.config.workers > 0, "config.data.workers", "say how many cores a service has"
            )
            addresses = service.assigned(self.config.service, shard=self.shard, shards=self.shards)
            return service.batches(of_steps, addresses=addresses, start_step=start_step)

        def batches(start: int, *, guarded: bool) -> Iterator[HostBatch]:
            steps = tf.data.Dataset.counter(start, dtype=tf.int64)
            return of_steps(steps, guarded=guarded).as_numpy_iterator()

        return _unguarded_first(batches, start=start_step)

    def _locate(self, position: tf.Tensor, *, epoch_size: int) -> Element:
        """From a position in this host's stream, int64 scalar, to the image's index and key."""
        slot = self.shard * self.local + position % self.local
        number = position // self.local * self.batch_size + slot
        epoch, number = number // epoch_size, number % epoch_size
        index = permute(
            number // self.repeats,
            size=len(self.source),
            seed=self.seed,
            epoch=self._in_cycle(epoch),
        )
        copy = number % self.repeats
        return with_key({"index": index}, seed=self.seed, epoch=epoch * self.repeats + copy)

    def _in_cycle(self, epoch: tf.Tensor | int, *, copies: int = 1) -> tf.Tensor | int:
        """The epoch within the cycle; `copies` is how many numbers each epoch has."""
        return epoch % (self.cycle * copies) if self.cycle else epoch

    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self.source, batch_size=self.batch_size, shards=self.shards)

    def _batches(self, elements: tf.data.Dataset, *, guarded: bool) -> tf.data.Dataset:
        view = functools.partial(self._view, guarded=guarded)
        return _make_batches(
            elements, view, self.views.batch, config=self.config, batch_size=self.local
        )

    def _view(self, element: Element, *, guarded: bool) -> Element:
        seed, epoch, index = tf.unstack(element["key"])
        key = tf.stack([seed, self._in_cycle(epoch, copies=self.repeats), index])
        loaded = load_image(
            self.source,
            {**element, "key": key},
            guarded=guarded,
            window=self.views.window,
            accept=self.views.accept,
        )
        kept = {name: element[name] for name in ("index", "key")}
        kept |= {name: loaded[name] for name in ("replaced", "by_pillow")}
        return self.views.training(loaded, key) | kept


def steps_per_epoch(source: Source, *, batch_size: int, shards: int) -> int:
    """Whole batches in an epoch, where epochs consist of whole batches.

    Args:
      source: the training images.
      batch_size: of all hosts together.
      shards: number of hosts; it matters only for a source without random access, which is split
        between them.
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
) -> Iterator[HostBatch]:
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

    def view(element: Element, *, guarded: bool) -> Element:
        loaded = load_image(source, element, guarded=guarded, accept=views.accept)
        kept = {name: element[name] for name in ("index", "key", "valid")}
        kept |= {name: loaded[name] & element["valid"] for name in ("replaced", "by_pillow")}
        return views.evaluation(loaded) | kept

    elements = _padded_pass(source, batch_size=batch_size, shard=shard, shards=shards)
    elements = elements.map(lambda element: with_key(element, seed=EVAL_SEED, epoch=0))

    def batches(start: int, *, guarded: bool) -> Iterator[HostBatch]:
        guarded_view = functools.partial(view, guarded=guarded)
        rest = elements.skip(start * local)
        made = _make_batches(rest, guarded_view, views.batch, config=config, batch_size=local)
        return made.as_numpy_iterator()

    return _unguarded_first(batches, start=0)


def _padded_pass(source: Source, *, batch_size: int, shard: int, shards: int) -> tf.data.Dataset:
    """One host's images, once each, padded to whole batches; `valid` marks the images."""
    size, local = len(source), batch_size // shards
    if source.sequence is not None:
        records = source.sequence(seed=None, epoch=0, shard=shard, shards=shards)
        elements = records.map(lambda record: {**record, "valid": True})
        padding = tf.nest.map_structure(
            lambda spec: tf.zeros(spec.shape, spec.dtype), elements.element_spec
        )
        elements = elements.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
        return elements.take(math.ceil(math.ceil(size / shards) / local) * local)

    def locate(position: tf.Tensor) -> Element:
        number = position // local * batch_size + shard * local + position % local
        return {"index": tf.minimum(number, size - 1), "valid": number < size}

    return tf.data.Dataset.range(math.ceil(size / batch_size) * local).map(locate)


def _unguarded_first(
    batches: Callable[..., Iterator[HostBatch]], *, start: int
) -> Iterator[HostBatch]:
    """`batches(start, guarded=False)`, and from the first batch that fails on, with guards.

    A guard takes a sixth of an image's time, and most data sets need none.
    """
    step = start
    unguarded = batches(start, guarded=False)
    while True:
        try:
            batch = next(unguarded)
        except StopIteration:
            return
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            # TensorFlow's message quotes the path, or the image's first bytes. Where these are not
            # UTF-8, the bindings fail to decode the message and raise that instead of the error.
            logging.info(
                "An image can't be read; from here on each is guarded, which takes a little longer."
                " %s",
                _what_failed(error),
            )
            break
        yield batch
        step += 1
    yield from batches(step, guarded=True)


def _what_failed(error: Exception) -> str:
    """TensorFlow's message in one line, without the names of the graph's nodes."""
    message = str(getattr(error, "message", error))
    message = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*", "", message, flags=re.DOTALL)
    return " ".join(message.split())[:_QUOTED]


def _check(source: Source, views: Views, batch_size: int, *, shard: int, shards: int) -> int:
    """Checks what training and evaluation both need; returns a host's part of the batch size."""
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


def _make_batches(
    elements: tf.data.Dataset,
    view: Callable[[Element], Element],
    batch_view: Callable[[Element], Element],
    *,
    config: SourceConfig,
    batch_size: int,
) -> tf.data.Dataset:
    """Makes images in parallel, batches them, and adds what is made of a whole batch at once."""
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
    """Options for a deterministic pipeline with `workers` threads of its own, one per image.

    Everything parallel has a fixed size, so that memory doesn't grow with automatic tuning.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    return options


def cores() -> int:
    """Cores this process may use; in a container fewer than the machine has (except on macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
