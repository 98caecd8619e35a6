"""Random erasing, mixup and CutMix on a batch that is on the devices, and the loss they need.

Pure JAX, to be called under `jax.jit`: on the host these would cost a pass over every pixel of the
batch. Drawing random numbers and applying them are separate functions; neither depends on how the
batch is laid out over devices.

    images = erase(images, key=key, probability=0.25)
    images, partners, lam = mix(images, labels, key=key, config=MixingConfig())
    loss = lam * smoothed_cross_entropy(logits, labels, smoothing=0.1)
    loss += (1 - lam) * smoothed_cross_entropy(logits, partners, smoothing=0.1)

Shapes: b images of s × s pixels in g groups.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from beit_jax.config import MixingConfig, check
from beit_jax.types import Batch

# timm 0.3.2's RandomErasing as the official script calls it (datasets.py:127-169).
ERASE_AREA = (0.02, 1 / 3)  # share of the image, uniform
ERASE_MIN_ASPECT = 0.3  # height over width is log-uniform in [this, 1 / this]
ERASE_TRIES = 10


class Boxes(NamedTuple):
    """Rectangles of pixels; all fields are int32 `[n]`, the ends are exclusive. May be empty."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array

    @property
    def area(self) -> jax.Array:
        """Pixels, int32 `[n]`."""
        return (self.bottom - self.top) * (self.right - self.left)

    def inside(self, size: int) -> jax.Array:
        """Marks the pixels of `size` × `size` images inside the boxes: bool `[n, size, size]`."""
        pixel = jnp.arange(size)
        row = (pixel >= self.top[:, None]) & (pixel < self.bottom[:, None])
        column = (pixel >= self.left[:, None]) & (pixel < self.right[:, None])
        return row[:, :, None] & column[:, None, :]


def erase_boxes(
    key: jax.Array,
    *,
    batch: int,
    size: int,
    probability: float,
    area: tuple[float, float] = ERASE_AREA,
) -> Boxes:
    """Draws a box per image (timm's RandomErasing, one box, ten tries).

    A try draws area and aspect, rounds height and width to pixels, and counts if both are smaller
    than the image; the first that counts is placed uniformly.

    Args:
      key: randomness.
      batch: images, b.
      size: pixels along a side, s.
      probability: that an image has a box at all.
      area: least and largest share of the image a try draws.

    Returns:
      `b` boxes; empty where the image has none, by chance or because no try counted.
    """
    whether_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    tries = (batch, ERASE_TRIES)
    pixels = size**2 * jax.random.uniform(area_key, tries, minval=area[0], maxval=area[1])
    limit = math.log(1 / ERASE_MIN_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=-limit, maxval=limit))
    height = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (height < size) & (width < size)

    first = jnp.argmax(fits, axis=1, keepdims=True)
    wanted = jax.random.bernoulli(whether_key, probability, (batch,)) & fits.any(axis=1)
    height, width = (
        jnp.where(wanted, jnp.take_along_axis(sides, first, axis=1)[:, 0], 0)
        for sides in (height, width)
    )
    top = jax.random.randint(top_key, (batch,), 0, size - height + 1)
    left = jax.random.randint(left_key, (batch,), 0, size - width + 1)
    return Boxes(top=top, bottom=top + height, left=left, right=left + width)


def fill_with_noise(images: jax.Array, boxes: Boxes, *, key: jax.Array) -> jax.Array:
    """Replaces every value inside an image's box by an independent draw from N(0, 1).

    Args:
      images: normalised, float `[b, s, s, 3]`.
      boxes: one per image.
      key: randomness.

    Returns:
      Images of the same shape and dtype.
    """
    noise = jax.random.normal(key, images.shape, images.dtype)
    return jnp.where(boxes.inside(images.shape[1])[..., None], noise, images)


def erase(images: jax.Array, *, key: jax.Array, probability: float) -> jax.Array:
    """Random erasing, mode "pixel": puts a box of noise into some of the images (timm 0.3.2).

    Args:
      images: normalised, float `[b, s, s, 3]`.
      key: randomness.
      probability: that an image gets a box; 0 returns the images as they are.

    Returns:
      Images of the same shape and dtype.
    """
    if probability == 0:
        return images
    box_key, noise_key = jax.random.split(key)
    batch, size = images.shape[:2]
    boxes = erase_boxes(box_key, batch=batch, size=size, probability=probability)
    return fill_with_noise(images, boxes, key=noise_key)


class Mixture(NamedTuple):
    """How the groups of a batch are mixed, every group with itself reversed.

    Attributes:
      lam: float32 `[g]`, the weight of an image's own label; 1 where the group is not mixed.
      cutmix: bool `[g]`; false: mixup.
      boxes: `[g]`, what CutMix takes from the partner; meaningless for mixup.
    """

    lam: jax.Array
    cutmix: jax.Array
    boxes: Boxes


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
      images: as they came in, `[b, s, s, 3]`.
      partners: int32 `[b]`, the labels of the images mixed in.
      lam: float32 `[b]`, the weight of the own label; the partner's is 1 - lam.
    """

    images: jax.Array
    partners: jax.Array
    lam: jax.Array


def cutmix_boxes(lam: jax.Array, *, rows: jax.Array, columns: jax.Array, size: int) -> Boxes:
    """CutMix' boxes: a share of 1 - lam of the image, cut off at its border.

    timm 0.3.2's `rand_bbox`, in which odd sides lose a pixel; later releases give it back.

    Args:
      lam: float `[n]`.
      rows, columns: int `[n]`, the centres.
      size: pixels along a side.

    Returns:
      `n` boxes.
    """
    half = (size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2

    def clip(edge: jax.Array) -> jax.Array:
        return jnp.clip(edge, 0, size)

    return Boxes(
        top=clip(rows - half),
        bottom=clip(rows + half),
        left=clip(columns - half),
        right=clip(columns + half),
    )


def draw_mixture(key: jax.Array, *, size: int, config: MixingConfig) -> Mixture:
    """Draws how the `config.groups` groups are mixed (timm's `Mixup`, mode "batch").

    Args:
      key: randomness.
      size: pixels along a side of an image.
      config: with mixup or CutMix on.

    Returns:
      One draw per group; CutMix' lam is 1 minus the box' share of the image, after clipping.
    """
    whether_key, switch_key, lam_key, row_key, column_key = jax.random.split(key, 5)
    shape = (config.groups,)
    whether = jax.random.bernoulli(whether_key, config.probability, shape)
    if config.mixup > 0 and config.cutmix > 0:
        cutmix = jax.random.bernoulli(switch_key, config.switch_probability, shape)
    else:
        cutmix = jnp.full(shape, config.cutmix > 0)
    parameter = jnp.where(cutmix, config.cutmix, config.mixup)
    lam = jax.random.beta(lam_key, parameter, parameter, shape)
    boxes = cutmix_boxes(
        lam,
        rows=jax.random.randint(row_key, shape, 0, size),
        columns=jax.random.randint(column_key, shape, 0, size),
        size=size,
    )
    lam = jnp.where(cutmix, 1 - boxes.area / size**2, lam)
    return Mixture(lam=jnp.where(whether, lam, 1.0), cutmix=cutmix & whether, boxes=boxes)


def apply_mixture(images: jax.Array, labels: jax.Array, mixture: Mixture) -> Mixed:
    """Mixes every group of consecutive images with itself reversed.

    Args:
      images: normalised, float `[b, s, s, 3]`, b a multiple of the groups. The middle image of an
        odd group is its own partner.
      labels: int `[b]`.
      mixture: of g groups.

    Returns:
      The mixed batch.
    """
    groups, size = mixture.lam.shape[0], images.shape[1]
    # [b, ...] → [g, b/g, ...]: reversed inside a group, so that a group on one device stays there.
    grouped = images.reshape(groups, -1, *images.shape[1:])
    own = jnp.where(
        mixture.cutmix[:, None, None],
        ~mixture.boxes.inside(size),
        mixture.lam[:, None, None],
    )
    own = own[:, None, :, :, None].astype(images.dtype)
    mixed = own * grouped + (1 - own) * grouped[:, ::-1]
    partners = labels.reshape(groups, -1)[:, ::-1].reshape(labels.shape)
    return Mixed(
        images=mixed.reshape(images.shape),
        partners=partners.astype(jnp.int32),
        lam=jnp.repeat(mixture.lam, images.shape[0] // groups),
    )


def mix(images: jax.Array, labels: jax.Array, *, key: jax.Array, config: MixingConfig) -> Mixed:
    """Applies mixup or CutMix to a batch, every group with itself reversed.

    Where `config.mixup` is 0 only CutMix is applied, and vice versa; where both are 0, nothing is,
    and every lam is 1.

    Args:
      images: normalised, float `[b, s, s, 3]`.
      labels: int `[b]`.
      key: randomness.
      config: mixup and CutMix.

    Returns:
      Images, the partners' labels and the weights of the own labels.

    Raises:
      ConfigError: the batch does not divide into `config.groups`.
    """
    batch, size = images.shape[:2]
    check(
        batch % config.groups == 0,
        "config.mixing.groups",
        f"a batch of {batch} does not divide into {config.groups} groups",
    )
    if config.mixup == 0 and config.cutmix == 0:
        return Mixed(images, labels.astype(jnp.int32), jnp.ones(batch))
    return apply_mixture(images, labels, draw_mixture(key, size=size, config=config))


def image_weights(batch: Batch) -> jax.Array:
    """How much every image counts: float32 `[b]`, 1 or 0.

    0 is for the padding of a last batch (`valid`), and for a grey image in place of one that could
    not be decoded, which has no class (`label` under 0).
    """
    size = next(iter(batch.values())).shape[0]
    weights = jnp.ones(size, jnp.float32)
    if "valid" in batch:
        weights = weights * batch["valid"]
    if "label" in batch:
        weights = weights * (batch["label"] >= 0)
    return weights


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float) -> jax.Array:
    """Cross-entropy with a share of the target spread evenly over all C classes.

    (1 - smoothing) · (-log p_y) + smoothing · mean_c(-log p_c): the target is 1 - smoothing +
    smoothing / C at the label and smoothing / C elsewhere, as in timm and PyTorch. It is linear in
    the target: a mixed batch takes lam times this for the labels plus 1 - lam times this for the
    partners.

    Args:
      logits: `[b, C]`.
      labels: int `[b]`.
      smoothing: in [0, 1]; 0.1 in fine-tuning.

    Returns:
      float32 `[b]`, in nats.
    """
    surprise = -jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.take_along_axis(surprise, labels[:, None], axis=1)[:, 0]
    return (1 - smoothing) * own + smoothing * surprise.mean(axis=1)
