"""What a source of images is, what opening one needs, and which images are held out."""

import dataclasses
import hashlib
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from beit_jax.config import SegmentDataConfig, SourceConfig, check
from beit_jax.config.parse import shown

# Tensors by name: an image with its label, say.
Element = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A set of images.

    Attributes:
      size: number of images.
      name: a function from an index to what a person calls that image, such as its path.
      load: a function from an index (int64 scalar tensor) to `image`, uint8 [h, w, 3] RGB, and the
        other `fields`: `label` (int32 scalar), `segmentation` (uint8 [h, w]). It may add
        `by_pillow` (bool scalar): the slow way of decoding was needed. It works in a tf.data
        graph, and raises a TensorFlow error there for an image that can't be read or decoded. With
        `window=`, a `Window` or None, `image` is only that part of it; `segmentation` stays whole.
      fields: the names of what `load` returns.
      classes: class names, where images have labels; a label is an index into this tuple.
      segmentation_classes: names of the classes that label maps show, where they are known; 0 has
        none where the settings say that it is no class.
      reliable: `load` can't fail.
      portable: `load` also works in another process (`data/service.py`), since its graph is pure
        TensorFlow.
      sequence: None where access is random. Otherwise records come only in order:
        `sequence(seed=, epoch=, shard=, shards=)` is a dataset of dicts with `index` (int64, the
        position in that order) and what `load` then takes in place of an index. Shards don't
        overlap. The order is shuffled as a function of (seed, epoch), or is the stored one where
        seed is None.
    """

    size: int
    name: Callable[[int], str]
    load: Callable[..., Element]
    fields: tuple[str, ...] = ("image",)
    classes: tuple[str, ...] = ()
    segmentation_classes: tuple[str, ...] = ()
    reliable: bool = False
    sequence: Callable[..., tf.data.Dataset] | None = None
    portable: bool = True

    def __len__(self) -> int:
        return self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a kind of source is asked to open.

    Attributes:
      value: what follows the kind's name and colon: a path, a number.
      setting: the full name of the setting that asks, for error messages.
      config: how images are read, and how many are held out.
      training: whether these images are for training or for evaluation.
    """

    value: str
    setting: str
    config: SourceConfig
    training: bool

    @property
    def withholds(self) -> bool:
        """Whether the evaluation images are taken out of this same source."""
        return not self.config.eval_source

    @property
    def label_maps(self) -> bool:
        """Whether the job reads label maps. Files that hold them are not read for any other job."""
        return isinstance(self.config, SegmentDataConfig)


def check_holdout(config: SourceConfig) -> None:
    """Raises ConfigError unless some images are held out."""
    check(
        config.holdout > 0,
        "config.data.holdout",
        "0 leaves no images to evaluate on; hold some out or give config.data.eval_source",
    )


def select_split(size: int, *, identity: Callable[[int], str], request: Request) -> np.ndarray:
    """The training or the held-out images of a finite set.

    Which images are held out depends on a hash of their identity, so that adding images to a set
    hardly moves the others in or out.

    Args:
      size: number of images in the set.
      identity: a function from an index to a text that stays with that image.
      request: what is being opened.

    Returns:
      int64 [n]: indices, rising.

    Raises:
      ConfigError: nothing is left to train on, or to evaluate on.
    """
    if not request.withholds:
        return np.arange(size)
    if not request.training:
        check_holdout(request.config)
    holdout = request.config.holdout
    check(
        holdout < size,
        "config.data.holdout",
        f"{holdout} of the {size} images in {shown(request.value)} leave none to train on",
    )
    chosen = heapq.nsmallest(holdout, range(size), key=lambda index: _stable_hash(identity(index)))
    held_out = np.zeros(size, bool)
    held_out[np.array(chosen, np.int64)] = True
    return np.flatnonzero(held_out != request.training)


def spread(source: Source, *, count: int) -> Source:
    """A part of a source, evenly spaced over all of it; the whole one where it has no more.

    Which images come together in a sorted folder says nothing about the others, so that the first
    few of them stand for nothing.

    Args:
      source: the images. One that can only be read from front to back is returned whole: whoever
        reads it takes the first `count`.
      count: how many, at least 1.

    Returns:
      A source of which image i is image `floor(i * size / count)` of `source`.
    """
    size = len(source)
    if count >= size or source.sequence is not None:
        return source

    def load(index: tf.Tensor, **options: Any) -> Element:
        return source.load(index * size // count, **options)

    return dataclasses.replace(
        source, size=count, name=lambda index: source.name(index * size // count), load=load
    )


def _stable_hash(text: str) -> bytes:
    """A hash that is the same in every process; `text` may hold bytes that are not UTF-8."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
