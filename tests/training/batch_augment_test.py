"""Erasing, mixup, CutMix and smoothed labels, each against a plain one-image-at-a-time reference.

The references follow timm 0.3.2's definitions and draw with Python's or numpy's own generators, so
that only distributions can be compared where something is drawn. Keys are fixed: nothing here
passes by luck. Where a bound on a distribution is used, a wrong distribution is shown to break it.
"""

import dataclasses
import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError, MixingConfig
from beit_jax.planning import hlo
from beit_jax.training import batch_augment, sharding
from beit_jax.training.batch_augment import Boxes, Mixture

MANY = 20_000


def normal_images(*, batch, size, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def boxes_of(rows):
    """Boxes from (top, bottom, left, right) of each image."""
    return Boxes(*(jnp.asarray(column, jnp.int32) for column in zip(*rows, strict=True)))


def largest_gap(one, two):
    """Between the two samples' distribution functions (Kolmogorov and Smirnov's statistic)."""
    one, two = np.sort(one), np.sort(two)
    values = np.concatenate([one, two])
    shares = [np.searchsorted(x, values, side="right") / len(x) for x in (one, two)]
    return np.abs(shares[0] - shares[1]).max()


# Two samples of 20,000 from the same distribution are further apart once in ten million.
SAME = 0.029


def reference_box(generator, *, size, probability, area, aspect=None):
    """(top, bottom, left, right) of one image, or None: timm's loop over tries."""
    if generator.random() > probability:
        return None
    for _ in range(10):
        pixels = generator.uniform(*area) * size * size
        limits = (math.log(0.3), math.log(1 / 0.3))
        ratio = math.exp(generator.uniform(*limits)) if aspect is None else aspect(generator)
        height = round(math.sqrt(pixels * ratio))
        width = round(math.sqrt(pixels / ratio))
        if width < size and height < size:
            top = generator.randint(0, size - height)
            left = generator.randint(0, size - width)
            return top, top + height, left, left + width
    return None


def reference_boxes(*, count, **settings):
    generator = random.Random(0)
    drawn = [reference_box(generator, **settings) for _ in range(count)]
    return np.array([box for box in drawn if box is not None])


@functools.cache
def drawn_boxes(*, count, size, probability, area=batch_augment.ERASE_AREA):
    boxes = jax.jit(
        lambda key: batch_augment.erase_boxes(
            key, batch=count, size=size, probability=probability, area=area
        )
    )(jax.random.key(0))
    rows = np.stack([np.asarray(edge) for edge in boxes], axis=1)
    return rows[np.asarray(boxes.area) > 0]


def features(rows, *, size):
    """What a box is made of, as independent numbers: area, log aspect, and where it lies."""
    top, bottom, left, right = np.asarray(rows, np.float64).T
    height, width = bottom - top, right - left
    return {
        "area": height * width / size**2,
        "log aspect": np.log(height / width),
        "height": height,
        "top": top / (size - height),
        "left": left / (size - width),
    }


def test_erased_boxes_have_timms_distribution():
    size = 224
    actual = drawn_boxes(count=MANY, size=size, probability=1.0)
    reference = reference_boxes(count=MANY, size=size, probability=1.0, area=(0.02, 1 / 3))
    actual, reference = features(actual, size=size), features(reference, size=size)
    for name in actual:
        assert largest_gap(actual[name], reference[name]) < SAME, name
    # By the definition, too: both are uniform but for the rounding to pixels.
    np.testing.assert_allclose(actual["area"].mean(), (0.02 + 1 / 3) / 2, rtol=0.01)
    np.testing.assert_allclose(actual["area"].std(), (1 / 3 - 0.02) / 12**0.5, rtol=0.02)
    np.testing.assert_allclose(actual["log aspect"].mean(), 0, atol=0.02)
    np.testing.assert_allclose(actual["log aspect"].std(), 2 * np.log(1 / 0.3) / 12**0.5, rtol=0.02)
    # Both ends of the range of positions are reached.
    assert actual["top"].min() == actual["left"].min() == 0
    assert actual["top"].max() == actual["left"].max() == 1


def test_the_bound_tells_a_uniform_aspect_and_another_area_apart():
    size = 224
    actual = features(drawn_boxes(count=MANY, size=size, probability=1.0), size=size)
    settings = {"count": MANY, "size": size, "probability": 1.0}
    wrong = reference_boxes(
        **settings, area=(0.02, 1 / 3), aspect=lambda generator: generator.uniform(0.3, 1 / 0.3)
    )
    assert largest_gap(actual["log aspect"], features(wrong, size=size)["log aspect"]) > 5 * SAME
    wrong = features(reference_boxes(**settings, area=(0.02, 0.4)), size=size)
    assert largest_gap(actual["area"], wrong["area"]) > 3 * SAME


@pytest.mark.parametrize("probability", [0.25, 0.6])
def test_the_share_of_erased_images_is_the_probability(probability):
    erased = len(drawn_boxes(count=MANY, size=224, probability=probability)) / MANY
    assert abs(erased - probability) < 5 * (probability * (1 - probability) / MANY) ** 0.5


def test_a_try_counts_only_if_both_sides_are_smaller_than_the_image():
    """Most tries of so large an area fail: ten of them are needed, and not always enough."""
    size, area = 16, (0.7, 1.0)
    actual = drawn_boxes(count=MANY, size=size, probability=1.0, area=area)
    reference = reference_boxes(count=MANY, size=size, probability=1.0, area=area)
    share, expected = len(actual) / MANY, len(reference) / MANY
    assert 0.2 < expected < 0.8, "the case is one where it matters"
    assert abs(share - expected) < 0.02
    for name, values in features(actual, size=size).items():
        assert largest_gap(values, features(reference, size=size)[name]) < 2 * SAME, name
    height, width = actual[:, 1] - actual[:, 0], actual[:, 3] - actual[:, 2]
    assert height.max() == width.max() == size - 1


def test_noise_fills_exactly_the_boxes():
    """Fixed boxes: what is outside is untouched, what is inside is normal and all different."""
    size = 24
    rows = [(0, 24, 0, 24), (3, 10, 5, 21), (0, 0, 0, 0), (23, 24, 0, 1)]
    images = 100 + normal_images(batch=4, size=size)
    result = batch_augment.fill_with_noise(images, boxes_of(rows), key=jax.random.key(1))
    result = np.asarray(result)
    expected = images.copy()
    noise = []
    for index, (top, bottom, left, right) in enumerate(rows):
        cut = result[index, top:bottom, left:right]
        noise.append(cut.ravel())
        expected[index, top:bottom, left:right] = cut
    np.testing.assert_array_equal(result, expected)
    noise = np.concatenate(noise)
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.std() - 1) < 5 / (2 * noise.size) ** 0.5
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.05, "normal, not uniform"


def test_erase_erases_some_images_and_no_other_pixels():
    images = 100 + normal_images(batch=64, size=32)
    erase = jax.jit(
        lambda key, p: batch_augment.erase(images, key=key, probability=p), static_argnums=1
    )
    np.testing.assert_array_equal(erase(jax.random.key(0), 0.0), images)
    result = np.asarray(erase(jax.random.key(0), 0.5))
    changed = (result != images).any(axis=(1, 2, 3))
    assert 16 < changed.sum() < 48
    assert (np.abs(result[result != images]) < 7).all()
    assert result.dtype == np.float32
    other = np.asarray(erase(jax.random.key(1), 0.5))
    assert (changed != (other != images).any(axis=(1, 2, 3))).any(), "another key, other images"


def reference_mix(images, labels, *, lams, cutmix, boxes, groups, classes, smoothing):
    """timm's `_mix_batch` and `mixup_target` for each part of the batch; float64."""
    parts = []
    size = len(images) // groups
    off = smoothing / classes
    for g in range(groups):
        x = images[g * size : (g + 1) * size].astype(np.float64)
        y = np.full((size, classes), off)
        y[np.arange(size), labels[g * size : (g + 1) * size]] = 1 - smoothing + off
        other, lam = x[::-1].copy(), lams[g]
        if cutmix[g]:
            top, bottom, left, right = boxes[g]
            x = x.copy()
            x[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        else:
            x = x * lam + other * (1 - lam)
        parts.append((x, y * lam + y[::-1] * (1 - lam)))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def soft_target_cross_entropy(logits, targets):
    """float64 `[b]`."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return -(targets * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1)


def one_hot(labels, classes):
    return np.eye(classes)[labels]


# Of a 20 × 20 image; lam is what the clipped box leaves.
MIXED_BOXES = [(0, 0, 0, 0), (4, 11, 0, 20), (0, 5, 15, 20)]


@pytest.mark.parametrize("groups", [1, 3])
def test_mixing_at_fixed_draws_is_timms(groups):
    """Mixup, CutMix, and no mixing at all: images, and the loss against mixed soft targets."""
    size, classes = 20, 7
    cutmix = [False, True, True] if groups == 3 else [True]
    boxes = MIXED_BOXES if groups == 3 else MIXED_BOXES[1:2]
    shares = [(end - top) * (right - left) / size**2 for top, end, left, right in boxes]
    lams = [1 - share if cut else 0.3 for share, cut in zip(shares, cutmix, strict=True)]
    images = normal_images(batch=12, size=size)
    labels = np.random.default_rng(1).integers(0, classes, 12)
    mixture = Mixture(jnp.asarray(lams), jnp.asarray(cutmix), boxes_of(boxes))
    actual = jax.jit(batch_augment.apply_mixture)(images, labels, mixture)
    expected, targets = reference_mix(
        images,
        labels,
        lams=lams,
        cutmix=cutmix,
        boxes=boxes,
        groups=groups,
        classes=classes,
        smoothing=0.1,
    )
    np.testing.assert_allclose(actual.images, expected, rtol=1e-6, atol=1e-6)
    assert (np.asarray(actual.images) != images).any()

    logits = 3 * np.random.default_rng(2).normal(size=(12, classes)).astype(np.float32)
    own, partner = (
        batch_augment.smoothed_cross_entropy(logits, classes_of, smoothing=0.1)
        for classes_of in (jnp.asarray(labels), actual.partners)
    )
    loss = actual.lam * own + (1 - actual.lam) * partner
    np.testing.assert_allclose(loss, soft_target_cross_entropy(logits, targets), rtol=1e-5)


def test_lam_one_changes_no_bit():
    images = normal_images(batch=4, size=8)
    labels = np.arange(4)
    mixture = Mixture(jnp.ones(1), jnp.asarray([False]), boxes_of([(0, 8, 0, 8)]))
    actual = batch_augment.apply_mixture(images, labels, mixture)
    np.testing.assert_array_equal(actual.images, images)
    np.testing.assert_array_equal(actual.partners, labels[::-1])
    np.testing.assert_array_equal(actual.lam, np.ones(4))


def reference_cutmix_box(*, size, lam, row, column):
    """timm 0.3.2's rand_bbox with its centre given."""
    cut = int(size * np.sqrt(1 - lam))
    edges = [c + sign * (cut // 2) for c in (row, column) for sign in (-1, 1)]
    return tuple(int(np.clip(edge, 0, size)) for edge in edges)


@pytest.mark.parametrize("size", [32, 37])
def test_cutmix_boxes_at_fixed_draws_are_timms(size):
    rng = np.random.default_rng(0)
    lam = rng.uniform(size=500).astype(np.float32)
    rows, columns = rng.integers(0, size, (2, 500))
    boxes = batch_augment.cutmix_boxes(
        jnp.asarray(lam), rows=jnp.asarray(rows), columns=jnp.asarray(columns), size=size
    )
    actual = np.stack([np.asarray(edge) for edge in boxes], axis=1)
    reference = [
        reference_cutmix_box(size=size, lam=np.float64(value), row=row, column=column)
        for value, row, column in zip(lam, rows, columns, strict=True)
    ]
    np.testing.assert_array_equal(actual, reference)
    np.testing.assert_array_equal(boxes.area, np.asarray(boxes.inside(size)).sum(axis=(1, 2)))


@functools.cache
def draw(config, *, size=64):
    mixture = jax.jit(
        lambda key: batch_augment.draw_mixture(
            key, size=size, config=dataclasses.replace(config, groups=MANY)
        )
    )(jax.random.key(0))
    return jax.tree.map(np.asarray, mixture)


def test_mixups_lam_has_the_beta_distribution():
    """Moments of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))."""
    mixture = draw(MixingConfig(cutmix=0.0))
    assert not mixture.cutmix.any()
    np.testing.assert_allclose(mixture.lam.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(mixture.lam.var(), 1 / (4 * (2 * 0.8 + 1)), rtol=0.02)
    rng = np.random.default_rng(0)
    assert largest_gap(mixture.lam, rng.beta(0.8, 0.8, MANY)) < SAME
    assert abs(mixture.lam.var() - 1 / 12) > 0.1 / 12, "the uniform one is ruled out"


def test_cutmix_lam_is_what_the_clipped_box_leaves():
    size = 64
    mixture = draw(MixingConfig(mixup=0.0), size=size)
    assert mixture.cutmix.all()
    np.testing.assert_allclose(mixture.lam, 1 - mixture.boxes.area / size**2, rtol=1e-6)
    rng = np.random.default_rng(0)
    reference = [
        reference_cutmix_box(
            size=size, lam=rng.beta(1, 1), row=rng.integers(0, size), column=rng.integers(0, size)
        )
        for _ in range(MANY)
    ]
    reference = Boxes(*np.array(reference).T)
    assert largest_gap(mixture.lam, 1 - reference.area / size**2) < SAME
    for name, drawn, expected in zip(Boxes._fields, mixture.boxes, reference, strict=True):
        assert largest_gap(drawn, expected) < SAME, name
    # Without the correction it would be uniform.
    assert largest_gap(mixture.lam, rng.uniform(size=MANY)) > 3 * SAME


@pytest.mark.parametrize(("switch", "probability"), [(0.5, 1.0), (0.2, 0.7)])
def test_groups_are_switched_and_left_alone_in_proportion(switch, probability):
    mixture = draw(MixingConfig(switch_probability=switch, probability=probability))
    mixed = mixture.lam < 1
    assert not mixture.cutmix[~mixed & (mixture.boxes.area > 0)].any()
    # A Beta may give exactly 1, and a box be empty: rare, and within the tolerance.
    assert abs(mixed.mean() - probability) < 0.02
    assert abs(mixture.cutmix[mixed].mean() - switch) < 0.02
    mixup = mixture.lam[mixed & ~mixture.cutmix]
    np.testing.assert_allclose(mixup.var(), 1 / (4 * (2 * 0.8 + 1)), rtol=0.05)


def test_groups_draw_independently():
    lam = draw(MixingConfig(cutmix=0.0)).lam
    assert abs(np.corrcoef(lam[:-1], lam[1:])[0, 1]) < 5 / MANY**0.5


def test_both_off_is_nothing():
    images, labels = normal_images(batch=6, size=8), jnp.arange(6)
    config = MixingConfig(mixup=0.0, cutmix=0.0)
    actual = batch_augment.mix(images, labels, key=jax.random.key(0), config=config)
    np.testing.assert_array_equal(actual.images, images)
    np.testing.assert_array_equal(actual.lam, np.ones(6))
    assert (actual.lam.dtype, actual.partners.dtype) == (jnp.float32, jnp.int32)


def test_a_batch_that_does_not_divide_names_the_setting():
    with pytest.raises(ConfigError, match=r"mixing\.groups: a batch of 6 does not .* 4 groups"):
        batch_augment.mix(
            jnp.zeros((6, 8, 8, 3)),
            jnp.zeros(6, jnp.int32),
            key=jax.random.key(0),
            config=MixingConfig(groups=4),
        )


def on_devices(count, function, *arrays):
    """What `function` gives, and its communication, with its arrays split over `count` devices."""
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:count])
    split = jax.NamedSharding(mesh, sharding.BATCH)
    arrays = jax.device_put(arrays, split)
    compiled = jax.jit(function, out_shardings=split).lower(*arrays).compile()
    return jax.tree.map(np.asarray, compiled(*arrays)), hlo.read(compiled.as_text()).collectives


@pytest.mark.slow
def test_one_and_eight_devices_erase_the_same():
    images = normal_images(batch=32, size=16)

    def erase(images):
        return batch_augment.erase(images, key=jax.random.key(3), probability=0.5)

    one, _ = on_devices(1, erase, images)
    eight, moved = on_devices(8, erase, images)
    assert (one != images).any()
    np.testing.assert_allclose(one, eight, rtol=1e-6)
    assert not [move for move in moved if move.bytes > images[0].nbytes], "no image travels"


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 8])
def test_one_and_eight_devices_mix_the_same(groups):
    """Also: the partner is in the same group, and a group on one device stays there."""
    images, labels = normal_images(batch=32, size=16), np.arange(32)

    def mix(images, labels):
        config = MixingConfig(groups=groups)
        return batch_augment.mix(images, labels, key=jax.random.key(3), config=config)

    one, _ = on_devices(1, mix, images, labels)
    eight, moved = on_devices(8, mix, images, labels)
    for actual, reference in zip(one, eight, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-6, atol=1e-6)
    assert (one.images != images).any()
    expected = labels.reshape(groups, -1)[:, ::-1].ravel()
    np.testing.assert_array_equal(one.partners, expected)
    travels = [move for move in moved if move.bytes >= images[0].nbytes]
    assert bool(travels) == (groups == 1)


def test_smoothed_cross_entropy_is_timms_soft_target():
    """Against one-hot targets in float64, also from bfloat16 logits and at the two ends."""
    rng = np.random.default_rng(0)
    classes = 11
    logits = 20 * rng.normal(size=(50, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 50)
    for smoothing in (0.0, 0.1, 1.0):
        on, off = 1 - smoothing + smoothing / classes, smoothing / classes
        targets = off + (on - off) * one_hot(labels, classes)
        actual = batch_augment.smoothed_cross_entropy(
            logits, jnp.asarray(labels), smoothing=smoothing
        )
        np.testing.assert_allclose(
            actual, soft_target_cross_entropy(logits, targets), rtol=1e-5, atol=1e-5
        )
    rounded = jnp.asarray(logits, jnp.bfloat16)
    actual = batch_augment.smoothed_cross_entropy(rounded, jnp.asarray(labels), smoothing=1.0)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(
        actual, soft_target_cross_entropy(np.asarray(rounded, np.float32), targets), rtol=1e-5
    )
