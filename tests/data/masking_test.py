"""Masks have the official distribution, equal a replay in plain Python, and need only keys."""

import functools
import hashlib
import math
import random

import numpy as np
import pytest
import tensorflow as tf

from beit_jax.config import ConfigError, MaskConfig
from beit_jax.data.masking import blocks, bounds, check_masks, draw_masks, max_masked, random_bits

OFFICIAL = MaskConfig()  # 75 of 14 x 14 patches
PAPER = MaskConfig(kind="block_paper")


def keys_of(indices, *, seed=0, epoch=0):
    """int64 [n, 3] keys."""
    indices = np.asarray(indices)
    return np.stack([np.full_like(indices, seed), np.full_like(indices, epoch), indices], axis=1)


@functools.cache
def drawer(config, grid):
    return tf.function(
        lambda keys: draw_masks(keys, config=config, grid=grid),
        input_signature=[tf.TensorSpec([None, 3], tf.int64)],
    )


@functools.cache
def draws(config, *, grid=14, n, seed=0, epoch=0):
    """bool [n, grid, grid]: the masks of images 0 to n - 1, in graph mode."""
    masks = drawer(config, grid)(keys_of(range(n), seed=seed, epoch=epoch)).numpy()
    masks.flags.writeable = False
    return masks


def reference(next_try, *, config, grid):
    """One mask as the algorithm's text has it, one patch at a time.

    `next_try(block, attempt)` gives four numbers in [0, 1): for area, aspect, top and left.
    """
    hidden = set()
    paper = config.kind == "block_paper"
    budget = config.ratio * grid * grid if paper else config.count
    block = 0
    while len(hidden) <= budget if paper else len(hidden) < budget:
        most = budget - len(hidden)
        if config.max_block is not None:
            most = min(most, config.max_block)
        new = set()
        for attempt in range(1 if paper else 10):
            area, aspect, top, left = next_try(block, attempt)
            area = config.min_block + area * (most - config.min_block)
            low, high = config.min_aspect, 1 / config.min_aspect
            if paper:
                aspect = low + aspect * (high - low)
            else:
                aspect = math.exp(math.log(low) + aspect * (math.log(high) - math.log(low)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if paper:
                height, width = (min(max(side, 1), grid) for side in (height, width))
            elif height >= grid or width >= grid:
                continue
            top, left = int(top * (grid - height + 1)), int(left * (grid - width + 1))
            cells = {(top + i, left + j) for i in range(height) for j in range(width)}
            if paper or 0 < len(cells - hidden) <= most:
                new = cells - hidden
                break
        if not new and not paper:
            break
        hidden |= new
        block += 1
    mask = np.zeros((grid, grid), bool)
    for cell in hidden:
        mask[cell] = True
    return mask


def reference_draws(config, *, n, grid=14):
    """Masks of `reference` with random numbers of Python's generator."""
    numbers = random.Random(20210615)
    return np.stack(
        [
            reference(
                lambda block, attempt: [numbers.random() for _ in range(4)],
                config=config,
                grid=grid,
            )
            for _ in range(n)
        ]
    )


def assert_same_distribution(actual, reference):
    """Compares counts by a two-sample chi-square and marginals by their largest difference."""
    actual_count, reference_count = (
        np.bincount(m.sum((1, 2)), minlength=300) for m in (actual, reference)
    )
    scale = len(actual) / len(reference)
    pooled = actual_count + reference_count
    common = pooled >= 40  # the others are merged into one more bin
    a = np.append(actual_count[common], actual_count[~common].sum()).astype(float)
    b = np.append(reference_count[common], reference_count[~common].sum()).astype(float)
    filled = a + b > 0
    chi_square = np.sum(
        (a / math.sqrt(scale) - b * math.sqrt(scale))[filled] ** 2 / (a + b)[filled]
    )
    freedom = filled.sum() - 1
    assert freedom >= 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    # 0.5 / sqrt(n) is the largest standard error of a frequency; 196 patches are compared.
    error = 0.5 * math.sqrt(1 / len(actual) + 1 / len(reference))
    assert np.abs(actual.mean(0) - reference.mean(0)).max() < 4.5 * error


@pytest.fixture(scope="module")
def masks():
    return draws(OFFICIAL, n=50_000)


class TestOfficialDistribution:
    """Against 20,000 draws of the official generator (tolerances include their standard errors)."""

    def test_counts(self, masks):
        counts = masks.sum((1, 2))
        assert counts.mean() == pytest.approx(74.47, abs=0.03)
        assert counts.std() == pytest.approx(0.99, abs=0.04)
        assert np.mean(counts == 75) == pytest.approx(0.666, abs=0.015)
        assert np.mean(counts >= 70) == pytest.approx(0.996, abs=0.002)
        assert list(np.percentile(counts, [1, 5, 25])) == [70, 72, 74]
        assert counts.max() == 75
        assert 58 <= counts.min() <= 66

    def test_marginals(self, masks):
        marginal = masks.mean(0)
        corners = marginal[[0, 0, -1, -1], [0, -1, 0, -1]]
        edge_middles = np.concatenate(
            [marginal[[0, -1], 6:8].ravel(), marginal[6:8, [0, -1]].ravel()]
        )
        np.testing.assert_allclose(corners, 0.04, atol=0.007)
        np.testing.assert_allclose(edge_middles, 0.19, atol=0.012)
        np.testing.assert_allclose(marginal[6:8, 6:8], 0.72, atol=0.015)

    @pytest.mark.parametrize(
        "mirror", [np.flipud, np.fliplr, np.transpose], ids=["vertical", "horizontal", "diagonal"]
    )
    def test_no_direction_is_preferred(self, masks, mirror):
        marginal = masks.mean(0)
        assert np.abs(marginal - mirror(marginal)).max() < 0.0145  # 4.5 standard errors

    def test_same_distribution_as_plain_python(self, masks):
        assert_same_distribution(masks, reference_draws(OFFICIAL, n=6000))


@pytest.mark.parametrize(
    ("config", "grid", "n"),
    [
        (OFFICIAL, 14, 1500),
        (PAPER, 14, 1000),
        (MaskConfig(max_block=24), 14, 300),
        (MaskConfig(min_aspect=1.0), 14, 300),
        (MaskConfig(count=230), 24, 200),
        (MaskConfig(count=600), 40, 40),
        (MaskConfig(count=4, min_block=2), 3, 300),
        (MaskConfig(count=30, min_block=4), 8, 300),
        (MaskConfig(count=64, min_block=1, min_aspect=0.1), 8, 300),
        (MaskConfig(kind="block_paper", max_block=20), 14, 200),
        (MaskConfig(kind="block_paper", min_block=1, ratio=0.9), 5, 300),
        (MaskConfig(kind="block_paper"), 40, 40),
    ],
    ids=str,
)
def test_replayed_in_plain_python_every_mask_is_identical(config, grid, n):
    tries = 1 if config.kind == "block_paper" else 10
    streams = random_bits.streams(tf.constant(keys_of(range(n), seed=3, epoch=5)))
    drawn = []

    def next_try(image, block, attempt):
        if block == len(drawn):
            area, aspect, corner = blocks.try_uniforms(
                streams, tf.constant(block, tf.uint64), tries=tries
            )
            drawn.append(np.stack([area, aspect, *corner]))
        return drawn[block][:, attempt, image].tolist()

    expected = [
        reference(functools.partial(next_try, image), config=config, grid=grid)
        for image in range(n)
    ]
    np.testing.assert_array_equal(draws(config, grid=grid, n=n, seed=3, epoch=5), expected)


@pytest.mark.parametrize(
    ("config", "grid", "n", "expected"),
    [
        (OFFICIAL, 14, 1000, "75fc04bd60983d5a"),
        (MaskConfig(kind="block_exact"), 14, 1000, "86ec55cf78c78cb2"),
        (PAPER, 14, 1000, "9f9c6becf2c73aa2"),
        (MaskConfig(kind="random"), 14, 1000, "6aa5c7fd050a7906"),
        (MaskConfig(max_block=24), 14, 500, "e45674027e1cd8c9"),
        (MaskConfig(count=230), 24, 500, "cd9c579f90435e90"),
        (MaskConfig(kind="block_paper", max_block=20), 24, 200, "f8e0c74882f0f8a7"),
    ],
    ids=str,
)
def test_masks_are_those_of_version_0_1(config, grid, n, expected):
    """A resumed run goes on with the masks that it began with: hashes from that version's code."""
    masks = draws(config, grid=grid, n=n, seed=11, epoch=4)
    assert hashlib.blake2b(np.packbits(masks).tobytes(), digest_size=8).hexdigest() == expected


class TestRandomNumbers:
    def test_splitmix64(self):
        """The published generator's first outputs for seed 0."""
        counters = tf.constant(np.arange(1, 4, dtype=np.uint64))
        words = random_bits.mix(counters * random_bits.uint64(random_bits.GOLDEN))
        assert [hex(word) for word in words.numpy().tolist()] == [
            "0xe220a8397b1dcdaf",
            "0x6e789e6aa1b965f4",
            "0x6c45d188009454f",
        ]

    @pytest.mark.parametrize("column", [0, 1, 2], ids=["seed", "epoch", "index"])
    def test_uniform_and_uncorrelated_over_consecutive_keys(self, column):
        n = 20_000
        keys = np.zeros((n, 3), np.int64)
        keys[:, column] = np.arange(n)
        area, aspect, corner = blocks.try_uniforms(
            random_bits.streams(tf.constant(keys)), tf.constant(1, tf.uint64), tries=3
        )
        numbers = np.stack([area, aspect, *corner]).reshape(12, n)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.stack([np.bincount((row * 64).astype(int), minlength=64) for row in numbers])
        chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum(1)
        assert np.abs(chi_square - 63).max() < 5 * math.sqrt(2 * 63)
        # All pairs of the numbers of one key and those of the next.
        pairs = np.corrcoef(np.concatenate([numbers[:, :-1], numbers[:, 1:]]))
        assert np.abs(pairs - np.eye(24)).max() < 5 / math.sqrt(n)


class TestKeys:
    @pytest.mark.parametrize("kind", ["block", "block_exact", "block_paper", "random"])
    def test_a_mask_depends_on_its_own_key_alone(self, kind):
        config = MaskConfig(kind=kind)
        draw = drawer(config, 14)
        keys = keys_of(range(200), seed=7, epoch=2)
        together = draw(keys).numpy()
        order = np.random.default_rng(0).permutation(len(keys))
        np.testing.assert_array_equal(draw(keys[order]).numpy(), together[order])
        np.testing.assert_array_equal(draw(keys[50:87]).numpy(), together[50:87])
        others = keys_of(range(33), seed=1, epoch=1)
        np.testing.assert_array_equal(
            draw(np.concatenate([others, keys])).numpy()[len(others) :], together
        )
        for image in (0, 13, 199):
            np.testing.assert_array_equal(draw(keys[image : image + 1]).numpy()[0], together[image])

    def test_the_same_key_twice_in_a_batch(self):
        masks = drawer(OFFICIAL, 14)(keys_of([5, 9, 5])).numpy()
        np.testing.assert_array_equal(masks[0], masks[2])
        assert (masks[0] != masks[1]).any()

    @pytest.mark.parametrize("kind", ["block", "random"])
    @pytest.mark.parametrize("other", ["seed", "epoch", "index", "swapped"])
    def test_different_keys_give_independent_masks(self, kind, other):
        n = 8000
        config = MaskConfig(kind=kind)
        masks = draws(config, n=n + 1)
        first = masks[:n].reshape(n, -1)
        if other == "index":
            second = masks[1:].reshape(n, -1)
        elif other == "swapped":  # (0, i, 0) instead of (0, 0, i)
            second = drawer(config, 14)(keys_of(range(n))[:, [0, 2, 1]]).numpy().reshape(n, -1)
            first, second = first[1:], second[1:]  # (0, 0, 0) is the same key
        else:
            second = draws(config, n=n, **{other: 1}).reshape(n, -1)
        assert (first == second).all(1).mean() < 0.001
        # Patches hidden in both, compared with independent masks of these marginals.
        shared = (first & second).sum(1)
        expected = (first.mean(0) * second.mean(0)).sum()
        assert abs(shared.mean() - expected) < 4.5 * shared.std() / math.sqrt(n)

    def test_large_and_negative_numbers(self):
        keys = np.array([[-1, 0, 0], [2**63 - 1, 2**62, 2**40], [-(2**63), 3, 10**12]])
        masks = drawer(OFFICIAL, 14)(keys).numpy()
        assert len({mask.tobytes() for mask in masks}) == 3
        assert masks.sum((1, 2)).min() >= 58


class TestBlockExact:
    CONFIG = MaskConfig(kind="block_exact")

    def test_exactly_count(self):
        assert set(draws(self.CONFIG, n=20_000).sum((1, 2))) == {75}

    def test_adds_to_the_official_mask_uniformly(self):
        n = 20_000
        before = draws(OFFICIAL, n=50_000)[:n]
        after = draws(self.CONFIG, n=n)
        assert (after >= before).all()
        # Each free patch of a mask that lacks d patches and has f free ones is taken with d / f.
        missing = 75 - before.sum((1, 2))
        chance = (missing / (196 - before.sum((1, 2))))[:, None, None] * ~before
        taken = (after & ~before).sum(0)
        deviation = (taken - chance.sum(0)) / np.sqrt((chance * (1 - chance)).sum(0))
        assert np.abs(deviation).max() < 4.5
        assert deviation.std() == pytest.approx(1, abs=0.2)


class TestBlockPaper:
    def test_counts(self):
        counts = draws(PAPER, n=20_000).sum((1, 2))
        assert counts.min() == 79  # the first whole number above 0.4 * 196
        assert counts.max() <= max_masked(PAPER, grid=14)

    def test_same_distribution_as_plain_python(self):
        assert_same_distribution(draws(PAPER, n=20_000), reference_draws(PAPER, n=5000))

    def test_bound_by_hand(self):
        # 78 are hidden; a block of area 16 and aspect 9/7 has sides 4.54 and 3.53: 5 x 4 patches.
        assert max_masked(PAPER, grid=14) == 98
        # Never more than the whole grid.
        assert max_masked(MaskConfig(kind="block_paper", ratio=0.9), grid=14) == 196

    @pytest.mark.parametrize(
        ("config", "grid"),
        [
            (MaskConfig(kind="block_paper", min_block=1, ratio=0.5), 3),
            (MaskConfig(kind="block_paper", min_block=4, ratio=0.4), 8),
            (MaskConfig(kind="block_paper", min_block=2, max_block=5, ratio=0.6), 7),
        ],
        ids=str,
    )
    def test_bound_holds_and_is_not_loose(self, config, grid):
        most = draws(config, grid=grid, n=30_000).sum((1, 2)).max()
        assert most <= max_masked(config, grid=grid) <= most + 3

    def test_reachable_sides_against_sampling(self):
        numbers = np.random.default_rng(0)
        area = numbers.uniform(5, 30, 400_000)
        aspect = np.exp(numbers.uniform(math.log(0.3), -math.log(0.3), area.size))
        height = np.rint(np.sqrt(area * aspect)).astype(int)
        width = np.rint(np.sqrt(area / aspect)).astype(int)
        seen = np.zeros((13, 13), bool)
        seen[height, width] = True
        sides = np.arange(1, 13)
        reachable = bounds.reachable(sides - 0.5, sides + 0.5, low=5, high=30, aspect=0.3)
        np.testing.assert_array_equal(reachable, seen[1:, 1:])


class TestRandom:
    def test_uniform(self):
        n, share = 20_000, 75 / 196
        masks = draws(MaskConfig(kind="random"), n=n)
        assert set(masks.sum((1, 2))) == {75}
        error = math.sqrt(share * (1 - share) / n)
        assert np.abs(masks.mean(0) - share).max() < 4.5 * error
        # Without replacement, any two patches correlate by -1 / 195.
        pairs = np.corrcoef(masks.reshape(n, -1).T)[np.triu_indices(196, 1)]
        assert pairs.mean() == pytest.approx(-1 / 195, rel=0.02)
        assert np.abs(pairs).max() < 5.5 / math.sqrt(n)

    def test_every_subset_is_equally_likely(self):
        masks = draws(MaskConfig(kind="random", count=2), grid=2, n=12_000).reshape(-1, 4)
        counts = np.bincount(masks @ [1, 2, 4, 8], minlength=16)
        subsets = counts[[3, 5, 6, 9, 10, 12]]
        assert subsets.sum() == 12_000
        assert ((subsets - 2000) ** 2 / 2000).sum() < 5 + 4 * math.sqrt(10)

    def test_all_patches(self):
        assert draws(MaskConfig(kind="random", count=9), grid=3, n=5).all()


@pytest.mark.parametrize("kind", ["block", "block_exact", "block_paper", "random"])
@pytest.mark.parametrize("grid", [2, 3, 5, 8, 24, 40])
def test_every_grid(kind, grid):
    config = MaskConfig(
        kind=kind, count=max(1, round(0.383 * grid**2)), min_block=16 if grid > 8 else 1
    )
    counts = draws(config, grid=grid, n=64).sum((1, 2))
    assert 1 <= counts.min() <= counts.max() <= max_masked(config, grid=grid)
    if kind in ("block_exact", "random"):
        assert counts.min() == config.count
    if kind == "block_paper":
        assert counts.min() > 0.4 * grid**2


@pytest.mark.parametrize("kind", ["block", "block_exact", "block_paper", "random"])
def test_the_same_eagerly_and_inside_tf_data(kind):
    config = MaskConfig(kind=kind)
    keys = keys_of(range(40), seed=2, epoch=9)
    expected = draw_masks(tf.constant(keys), config=config, grid=14).numpy()
    batches = (
        tf.data.Dataset.from_tensor_slices(keys)
        .batch(16)  # the last one has 8
        .map(lambda batch: draw_masks(batch, config=config, grid=14), num_parallel_calls=2)
    )
    assert batches.element_spec == tf.TensorSpec([None, 14, 14], tf.bool)
    np.testing.assert_array_equal(np.concatenate(list(batches.as_numpy_iterator())), expected)
    np.testing.assert_array_equal(drawer(config, 14)(keys).numpy(), expected)


@pytest.mark.parametrize("kind", ["block", "block_exact", "block_paper", "random"])
def test_empty_batch(kind):
    masks = draw_masks(tf.zeros([0, 3], tf.int64), config=MaskConfig(kind=kind), grid=14)
    assert masks.shape == (0, 14, 14)


class TestErrors:
    @pytest.mark.parametrize(
        ("config", "grid", "message"),
        [
            (MaskConfig(), 0, "grid: must be at least 1, got 0"),
            (
                MaskConfig(kind="stripes"),
                14,
                "kind: must be one of block, block_exact, block_paper",
            ),
            (MaskConfig(), 8, "count: 75 patches cannot be hidden on a 8 x 8 grid of 64"),
            (MaskConfig(kind="random"), 8, "count: 75 patches"),
            (MaskConfig(count=12), 14, "min_block: 16 is more than the 12 patches that count"),
            (PAPER, 6, "min_block: 16 is more than the 14.4 patches that ratio hides"),
            (MaskConfig(max_block=10), 14, "max_block: 10 is less than min_block 16"),
            (MaskConfig(count=1, min_block=1), 1, "min_block: no block of 1 to 1 patches"),
            (
                MaskConfig(count=9, min_block=9, min_aspect=0.9),
                3,
                "min_block: no block of 9 to 9 patches with an aspect between 0.9 and 1.11111 is "
                "shorter and narrower than a 3 x 3 grid",
            ),
        ],
        ids=str,
    )
    def test_impossible_settings(self, config, grid, message):
        for call in (
            lambda: check_masks(config, grid=grid),
            lambda: max_masked(config, grid=grid),
            lambda: draw_masks(tf.zeros([1, 3], tf.int64), config=config, grid=grid),
        ):
            with pytest.raises(ConfigError) as error:
                call()
            assert str(error.value).startswith(message)

    @pytest.mark.parametrize(
        "keys",
        [tf.zeros([4, 2], tf.int64), tf.zeros([3], tf.int64), tf.zeros([4, 3], tf.int32)],
        ids=["columns", "rank", "dtype"],
    )
    def test_bad_keys(self, keys):
        with pytest.raises(ValueError, match=r"keys must be int64 \[batch, 3\], got int"):
            draw_masks(keys, config=OFFICIAL, grid=14)

    def test_slots_of_the_other_kinds(self):
        for kind in ("block", "block_exact", "random"):
            assert max_masked(MaskConfig(kind=kind), grid=14) == 75
