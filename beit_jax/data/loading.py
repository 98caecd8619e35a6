"""Loads one image, and another one in its place where it can't be decoded."""

from collections.abc import Callable

import tensorflow as tf

from beit_jax.config.segment import IGNORE
from beit_jax.data.decode import Window
from beit_jax.data.order import permute
from beit_jax.data.sources import Element, Source

# Images that are tried in place of one that can't be decoded, before a grey one is used.
ALTERNATIVES = 5
GREY_SIDE = 64  # pixels


def load_image(
    source: Source,
    element: Element,
    *,
    guarded: bool,
    window: Callable[[tf.Tensor], Window] | None = None,
    accept: Callable[[Element], Element] | None = None,
) -> Element:
    """Loads an image. If guarded, an image that fails is replaced, always by the same other one.

    Dropping it instead would shift every later batch, and hosts would no longer agree on how many
    batches there are. A graph can't catch a failing operation, but a data set can skip elements
    that fail; hence a data set of one element (0.6 ms per image). Replacements are read only where
    they are needed; after the last of them comes a grey image.

    Args:
      source: the images.
      element: `index`, `key` and, for a source without random access, the record.
      guarded: replace an image that fails; otherwise the error ends the batch.
      window: a function from the key to the part of the image that is needed.
      accept: a function from what `source.load` returns to what is taken in its place. An image for
        which it fails counts as one that fails to load.

    Returns:
      What `source.load` returns, or `accept` makes of it, with `replaced` and `by_pillow`, bool
      scalars.
    """
    request = element if source.sequence is not None else element["index"]

    def load(request: tf.Tensor | Element, *, replaced: bool) -> Element:
        part = window(element["key"]) if window else None
        loaded = {"by_pillow": tf.constant(False), **source.load(request, window=part)}
        if accept is not None:
            loaded = accept(loaded)
        return {**loaded, "replaced": tf.constant(replaced)}

    if (source.reliable and accept is None) or not guarded:
        return load(request, replaced=False)

    first = tf.data.Dataset.from_tensors(request).map(lambda request: load(request, replaced=False))
    first = _first_good(first, fields=source.fields)
    if source.sequence is not None:
        return first

    def another() -> Element:
        seed, epoch, index = tf.unstack(element["key"])

        def alternative(variant: tf.Tensor) -> Element:
            other = permute(index, size=len(source), seed=seed, epoch=epoch, variant=variant)
            return load(other, replaced=True)

        others = tf.data.Dataset.range(1, 1 + ALTERNATIVES).map(alternative)
        return _first_good(others, fields=source.fields)

    return tf.cond(first["replaced"], another, lambda: first)


def _first_good(elements: tf.data.Dataset, *, fields: tuple[str, ...]) -> Element:
    """The first element that can be computed, or a grey image."""
    grey = {
        "image": tf.fill([GREY_SIDE, GREY_SIDE, 3], tf.constant(128, tf.uint8)),
        "label": tf.constant(-1),
        "segmentation": tf.fill([GREY_SIDE, GREY_SIDE], tf.constant(IGNORE, tf.uint8)),
    }
    grey = {name: grey[name] for name in fields}
    grey |= {"replaced": tf.constant(True), "by_pillow": tf.constant(False)}
    last = tf.data.Dataset.from_tensors(grey)
    return elements.ignore_errors().concatenate(last).take(1).get_single_element()
