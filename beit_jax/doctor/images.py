"""The images of a job: can they be read, are they pictures, are their colours plausible."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from beit_jax.config import RunConfig
from beit_jax.doctor.context import Context
from beit_jax.doctor.finding import Finding, ok, warning, wrong
from beit_jax.files import printable
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import HostBatch

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

LOOKED_AT = 96  # images of the training set; of the held-out set a third of it
# Levels of 255. A scan of white paper varies by more.
_CONSTANT = 1.5
# Of all pixels, in 0..1. Photographs have a mean of 0.40 to 0.48 and a deviation of 0.22 to 0.28
# (ImageNet's rows of `NORMALIZATIONS`). What was normalised once and then stored as 8 bits loses
# its negative half, and keeps means under 0.01.
_DARK, _VERY_DARK = 0.1, 0.04
_FLAT, _VERY_FLAT = 0.06, 0.025

# More than the longest recipes by far (BEiT: 800 epochs); such a run is a recipe for ImageNet that
# was given a folder of a few images.
_EPOCHS = 5_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photograph:
    """Facts of an image that could be read.

    Attributes:
      height, width: in pixels.
      mean, square: of each channel's pixels in [0, 1], float `[3]`: the mean and that of squares.
      deviation: of the pixels, in levels of 255.
      digest: of the pixels.
    """

    height: int
    width: int
    mean: np.ndarray
    square: np.ndarray
    deviation: float
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photographs:
    """Images that are spread over the training set and the held-out set.

    Attributes:
      found: facts of those that could be read, training images first.
      tried: how many were tried.
      bad: names of the others.
    """

    found: list[Photograph]
    tried: int
    bad: list[str]


def look_at(sources: "tuple[Source, Source]") -> Photographs:
    """Reads images that are spread evenly over both sources, one by one."""
    found: list[Photograph] = []
    bad: list[str] = []
    tried = 0
    for source, count in zip(sources, (LOOKED_AT, LOOKED_AT // 3), strict=True):
        for name, image in _images(source, count=count):
            tried += 1
            if image is None:
                bad.append(name)
            else:
                found.append(facts(image))
    return Photographs(found=found, tried=tried, bad=bad)


def facts(image: np.ndarray) -> Photograph:
    """Facts of an image, uint8 `[h, w, 3]`."""
    pixels = image.astype(np.float32) / 255
    return Photograph(
        height=image.shape[0],
        width=image.shape[1],
        mean=pixels.mean((0, 1)),
        square=np.square(pixels).mean((0, 1)),
        deviation=float(255 * pixels.std((0, 1)).max()),
        digest=hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest(),
    )


def _images(source: "Source", *, count: int) -> Iterator[tuple[str, np.ndarray | None]]:
    """Names and images of a source; None for one that can't be read."""
    import tensorflow as tf

    count = min(count, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist()
    requests: Iterator = iter(tf.constant(index, tf.int64) for index in indices)
    if source.sequence is not None:  # only from front to back
        requests = iter(source.sequence(seed=None, epoch=0, shard=0, shards=1).take(count))
        indices = range(count)
    for index, request in zip(indices, requests, strict=False):
        name = printable(source.name(int(index)))
        try:
            yield name, source.load(request)["image"].numpy()
        except (tf.errors.OpError, UnicodeDecodeError):  # the latter quotes the file's bytes
            yield name, None


def check_images(context: Context) -> list[Finding]:
    """The sources open, and images that are spread over them can be decoded."""
    training, evaluation = context.sources
    seen, allowed = context.photographs, context.config.data.max_bad_share
    findings = bad_share(seen, allowed=allowed)
    if not len(evaluation):
        findings.append(
            wrong(
                "no image is held out: nothing is evaluated",
                "set config.data.holdout, or config.data.eval_source",
            )
        )
    findings += epochs(context.config.run, images=len(training))
    if not findings:
        counts = f"{len(training):,} images to train on, {len(evaluation):,} held out"
        findings.append(ok(f"{counts}; all {seen.tried} that were tried can be decoded"))
    return findings


def epochs(run: RunConfig, *, images: int) -> list[Finding]:
    """A warning where a run goes over its images absurdly often."""
    times = run.steps * run.batch_size / max(1, images)
    if times <= _EPOCHS:
        return []
    what = f"{run.steps:,} steps of {run.batch_size:,} are {times:,.0f} epochs of {images:,} images"
    return [warning(what, "set config.run.steps to fewer, or config.data.source to more images")]


def bad_share(seen: Photographs, *, allowed: float) -> list[Finding]:
    """What images that can't be decoded mean for a run, which ends at more than `allowed`."""
    if not seen.bad:
        return []
    names = ", ".join(seen.bad[:3])
    what = f"{len(seen.bad)} of {seen.tried} images can't be decoded, among them {names}"
    expected = allowed * seen.tried
    if len(seen.bad) == seen.tried or len(seen.bad) > expected + 3 * expected**0.5:
        fix = (
            "look at one of them; take such files out, or raise config.data.max_bad_share"
            f" ({allowed:g}), at which the run ends"
        )
        return [wrong(what, fix)]
    return [warning(what, "take them out; the run puts other images in their place")]


def check_pixels(context: Context) -> list[Finding]:
    """Images show something, differ, and are about as large as the views cut out of them."""
    seen = context.photographs.found
    findings = variety(seen)
    size = max(context.config.data.image_size, 1)
    sides = [min(image.height, image.width) for image in seen]
    if sides and np.median(sides) < 0.5 * size:
        findings.append(
            warning(
                f"the images are {np.median(sides):.0f} pixels high or wide, and are enlarged to"
                f" {size}: no detail is there to learn from",
                "take larger images, or a smaller image_size of model and data",
            )
        )
    if not findings and seen:
        findings.append(ok(f"they differ, and measure {min(sides)} to {max(sides)} pixels"))
    return findings


def variety(seen: list[Photograph]) -> list[Finding]:
    """Findings about images of one colour, and the same image again and again."""
    if not seen:
        return []
    findings = []
    constant = sum(image.deviation < _CONSTANT for image in seen)
    what = f"{constant} of {len(seen)} images are of one colour"
    if constant > 0.5 * len(seen):
        fix = "look at the files: decoded wrongly, empty, or placeholders of failed downloads?"
        findings.append(wrong(what, fix))
    elif constant > 0.05 * len(seen):
        findings.append(warning(what, "take them out: there is nothing to learn from them"))
    different = len({image.digest for image in seen})
    if len(seen) > 1 and different <= 0.5 * len(seen) and constant <= 0.5 * len(seen):
        findings.append(
            wrong(
                f"only {different} of {len(seen)} images differ",
                "take the copies out: one file was stored under many names?",
            )
        )
    return findings


def check_normalization(context: Context) -> list[Finding]:
    """Mean and deviation of the pixels, before and after the recipe's normalisation."""
    return plausible(context.photographs.found, kind=context.config.data.normalization)


def plausible(seen: list[Photograph], *, kind: str) -> list[Finding]:
    """Whether the pixels look like photographs', which a normalisation is made for.

    Args:
      seen: facts of images.
      kind: a key of `NORMALIZATIONS`.
    """
    if not seen:
        return []
    mean = np.mean([image.mean for image in seen], axis=0)
    squares = np.mean([image.square for image in seen], axis=0)
    deviation = np.sqrt(np.maximum(squares - mean**2, 0))
    centre, scale = (np.asarray(values) for values in NORMALIZATIONS[kind])
    after, spread = ((mean - centre) / scale).mean(), (deviation / scale).mean()
    what = (
        f"pixels have mean {mean.mean():.2f} and deviation {deviation.mean():.2f} of [0, 1];"
        f" normalised as {kind!r}, {after:.2f} and {spread:.2f}"
    )
    fix = (
        "look at the files: images that were normalised, or divided by 255, before they were"
        " stored are nearly black; store plain 8-bit RGB, the run normalises by itself"
    )
    off = min(mean.mean(), 1 - mean.mean())
    if off < _VERY_DARK or deviation.mean() < _VERY_FLAT:
        return [wrong(f"{what}: not what photographs have (0.4 to 0.5 and 0.2 to 0.3)", fix)]
    if off < _DARK or deviation.mean() < _FLAT:
        return [warning(f"{what}: unusual for photographs (0.4 to 0.5 and 0.2 to 0.3)", fix)]
    return [ok(what)]


def check_masks(context: Context) -> list[Finding]:
    """Every image has a masked patch, and one that is left."""
    return masked(np.asarray(context.batch["mask"], bool))


def masked(masks: np.ndarray) -> list[Finding]:
    """Findings about masks, bool `[b, grid, grid]`."""
    shares = masks.mean((1, 2))
    what = (
        f"{shares.mean():.0%} of the patches are masked, {shares.min():.0%} to {shares.max():.0%}"
    )
    fix = "change config.data.mask: BEiT masks 75 of 196 patches, 38 %"
    if shares.min() == 0 or shares.max() == 1:
        part = "all" if shares.max() == 1 else "no"
        return [wrong(f"{what}: some images have {part} patches masked", fix)]
    if not 0.1 <= shares.mean() <= 0.9:
        return [warning(what, fix)]
    return [ok(what)]


def reading_speed(
    batches: Iterator[HostBatch], *, seconds: float, clock: Callable[[], float]
) -> float:
    """Images per second that a feed delivers.

    Args:
      batches: of the feed, whose first one has been taken.
      seconds: how long to read, at least; at least two batches.
      clock: seconds that pass.
    """
    for _ in range(3):  # those that were read ahead while nobody was looking
        next(batches)
    began, images = clock(), 0
    while True:
        images += len(next(iter(next(batches).values())))
        spent = clock() - began
        if spent >= seconds:
            return images / max(spent, 1e-9)
