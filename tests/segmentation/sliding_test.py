"""Whole images against mmseg's steps in PyTorch: every size, scale, batch and number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from beit_jax.config.segment import InferenceConfig
from beit_jax.preprocessing import normalize
from beit_jax.segmentation import confusion, sliding, windows
from beit_jax.segmentation.resize import resize_bilinear
from beit_jax.training import sharding

CROP, PATCH, CLASSES, TILE = 24, 6, 5, 16
NAMES = tuple("abcde")
SLIDE = InferenceConfig(stride=10, tile=TILE)
MANY = InferenceConfig(stride=16, scales=(0.5, 1.0, 1.75), flip=True, tile=TILE)
WEIGHTS = np.random.default_rng(0).normal(size=(PATCH * PATCH * 3, CLASSES)).astype(np.float32)
PLACES = np.random.default_rng(1).normal(size=(4, 4, CLASSES)).astype(np.float32)


def model(pixels):
    """A linear map of patches, plus what depends on the place in the window."""
    b, q = pixels.shape[0], CROP // PATCH
    patches = jnp.moveaxis(pixels.reshape(b, q, PATCH, q, PATCH, 3), 2, 3).reshape(b, q, q, -1)
    return 0.3 * patches @ WEIGHTS + PLACES


def random_image(size, *, seed=0):
    """Coarse colours, so that neighbouring pixels have to do with one another, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-size[0] // 5), -(-size[1] // 5), 3)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, size).astype(np.uint8)
    labels[rng.random(size) < 0.1] = 255
    return coarse.repeat(5, 0).repeat(5, 1)[: size[0], : size[1]], labels


def interpolated(x, size):
    """[h, w, c] → [*size, c] as PyTorch does it."""
    tensor = torch.from_numpy(np.array(x))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def reference(image, *, config, limits=(24, 96)):
    """Mean probabilities [h, w, c], one window after the other, with whole maps of logits."""
    probabilities = []
    h, w = image.shape[:2]
    for scale in config.scales:
        short, long = (int(limit * scale) for limit in limits)
        factor = min(long / max(h, w), short / min(h, w))
        if config.fill_window:
            factor = max(short, CROP) / min(h, w)
        size = (CROP, CROP)
        if config.mode == "slide":
            size = tuple(max(1, int(side * factor + 0.5)) for side in (h, w))
        resized = resize_bilinear(image, size=size)
        for flipped in (False, True) if config.flip else (False,):
            seen = resized[:, ::-1] if flipped else resized
            logits = slide(seen, stride=config.stride)
            logits = torch.from_numpy(interpolated(logits, (h, w)))
            shares = torch.softmax(logits, dim=-1).numpy()
            probabilities.append(shares[:, ::-1] if flipped else shares)
    return np.mean(probabilities, axis=0)


def slide(image, *, stride):
    h, w = image.shape[:2]
    total, hits = np.zeros((h, w, CLASSES), np.float32), np.zeros((h, w, 1), np.float32)
    rows, columns = (max(side - CROP + stride - 1, 0) // stride + 1 for side in (h, w))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + CROP, h), min(column * stride + CROP, w)
            part = np.s_[max(bottom - CROP, 0) : bottom, max(right - CROP, 0) : right]
            pixels = np.asarray(normalize(image[part], kind="imagenet"))
            missing = [(0, CROP - side) for side in pixels.shape[:2]]
            logits = interpolated(model(np.pad(pixels, [*missing, (0, 0)])[None])[0], (CROP, CROP))
            total[part] += logits[: pixels.shape[0], : pixels.shape[1]]
            hits[part] += 1
    return total / hits


@functools.cache
def compiled(*, passes):
    """`predict` and `confusion` as one program, compiled once per shape."""
    settings = {"normalization": "imagenet", "passes": passes}

    def both(batch):
        tiles = sliding.predict(model, batch, tile=TILE, **settings)
        return tiles, sliding.confusion(model, batch, **settings)

    return jax.jit(both)


# One for all images in batches of one.
ROOMS = windows.Rooms(tile=TILE, agree=lambda needed: [max(needed[0], 64), max(needed[1], 32)])


def packed(images, labels, *, config, count, rooms=ROOMS):
    prepared = [windows.prepare_image(image, config=config, crop=CROP) for image in images]
    return prepared, windows.pack(prepared, labels, images=count, crop=CROP, rooms=rooms)


@pytest.mark.parametrize(
    ("size", "config"),
    [
        ((48, 61), SLIDE),  # the last window is shifted back
        ((34, 44), SLIDE),  # 10 divides 34 - 24 and (resized to 31) not 31 - 24
        ((24, 44), SLIDE),  # nothing is resized, and two strides fit exactly
        ((100, 17), SLIDE),  # aspect over 4: the short side is less than a window
        ((1, 30), SLIDE),
        ((3, 2), SLIDE),  # enlarged eightfold
        ((40, 33), MANY),
        ((15, 90), InferenceConfig(stride=16, scales=(0.5, 2.0), fill_window=True, tile=TILE)),
        ((50, 20), InferenceConfig(mode="whole", flip=True, tile=TILE)),
    ],
)
def test_classes_and_loss_equal_the_reference(size, config):
    image, labels = random_image(size)
    passes = windows.passes(config)
    prepared, batch = packed([image], [labels], config=config, count=1)
    expected = reference(image, config=config)
    tiles, sums = compiled(passes=passes)(batch)
    classes = windows.assemble(np.asarray(tiles)[0], size=size)
    # Where two classes are equally probable, rounding decides.
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(classes[clear], expected.argmax(axis=-1)[clear])
    assert len(np.unique(classes)) > 1 or max(size) < 5

    found = confusion.scores(sums, names=NAMES)
    counted = labels < 255
    picked = np.take_along_axis(expected, np.minimum(labels, 4)[..., None].astype(int), axis=-1)
    assert found["loss"] == pytest.approx(-np.log(picked[..., 0][counted]).mean(), rel=1e-4)
    compared = confusion.compare(classes, labels, names=NAMES)
    assert compared.items() <= found.items()
    assert prepared[0].size == size


SIZES = [(48, 61), (20, 31), (30, 100), (9, 9), (64, 33), (24, 44)]


@pytest.fixture(scope="module")
def one_by_one():
    """Class maps and summed counts of six images, each in a batch of its own."""
    maps, total = [], None
    for seed, size in enumerate(SIZES):
        image, labels = random_image(size, seed=seed)
        _, batch = packed([image], [labels], config=MANY, count=1)
        tiles, sums = compiled(passes=6)(batch)
        maps.append(windows.assemble(np.asarray(tiles)[0], size=size))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return maps, confusion.scores(total, names=NAMES)


@pytest.mark.parametrize(
    ("count", "devices"),
    [
        (4, 2),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(8, 8, marks=pytest.mark.slow),
    ],
)
def test_batches_and_devices_change_nothing(one_by_one, count, devices):
    """The last batch is padded with images that do not count."""
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
    maps, total = [], None
    for first in range(0, len(SIZES), count):
        sizes = SIZES[first : first + count]
        images, labels = zip(
            *(random_image(size, seed=first + i) for i, size in enumerate(sizes)), strict=True
        )
        _, batch = packed(images, labels, config=MANY, count=count)
        found, sums = sharding.to_host(compiled(passes=6)(sharding.to_devices(batch, mesh)))
        maps += [
            windows.assemble(tiles, size=size) for tiles, size in zip(found, sizes, strict=False)
        ]
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    for found, expected in zip(maps, one_by_one[0], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert confusion.scores(total, names=NAMES) == pytest.approx(one_by_one[1], rel=1e-6)


@pytest.mark.slow
def test_no_pixels_travel_between_devices():
    """Each device segments its own images; only counts are summed."""
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:2])
    images, labels = zip(*(random_image((30, 40), seed=i) for i in range(2)), strict=True)
    _, batch = packed(images, labels, config=MANY, count=2)
    text = compiled(passes=6).lower(sharding.to_devices(batch, mesh)).compile().as_text()
    assert "all-reduce" in text
    for travels in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert travels not in text
