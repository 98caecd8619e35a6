"""The weighted vote against brute force in NumPy, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError
from beit_jax.evaluation import features, knn
from beit_jax.training import sharding
from tests.evaluation.examples import CLASSES, compiled_features


def brute_force(bank, labels, queries, *, counts, temperature):
    """Votes in float64, one query at a time."""
    bank, labels = bank[labels >= 0].astype(np.float64), labels[labels >= 0]
    result = np.zeros((len(queries), len(counts)), int)
    for row, query in enumerate(queries.astype(np.float64)):
        similarity = bank @ query
        order = np.argsort(-similarity)
        for column, count in enumerate(counts):
            votes = np.zeros(CLASSES)
            for neighbour in order[:count]:
                votes[labels[neighbour]] += np.exp(similarity[neighbour] / temperature)
            result[row, column] = votes.argmax()
    return result


def meshes():
    return {n: sharding.make_mesh(fsdp=min(n, 2), devices=jax.devices()[:n]) for n in (1, 8)}


def unit_rows(rng, rows, width=12):
    features = rng.normal(size=(rows, width)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def vote(counts, temperature):
    return knn.Vote(counts=counts, temperature=temperature, classes=CLASSES)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [3, 4096])
def test_votes_equal_brute_force(devices, rows, monkeypatch):
    """With one chunk, and with many small ones that have fewer rows than there are neighbours."""
    monkeypatch.setattr(knn, "BANK_ROWS", rows)
    rng = np.random.default_rng(5)
    bank = unit_rows(rng, 203)
    labels = rng.integers(0, CLASSES, 203).astype(np.int32)
    labels[rng.permutation(203)[:20]] = -1
    queries = unit_rows(rng, 40)
    bank[np.flatnonzero(labels < 0)[:5]] = queries[:5]  # the very nearest, but without a vote

    mesh = meshes()[devices]
    placed = knn.split_bank(bank, labels, mesh=mesh)
    for temperature in (0.07, 1.0, 0.005):
        weighted_vote = functools.partial(
            knn.weighted_vote, vote=vote((1, 5, 20), temperature), mesh=mesh
        )
        predicted = jax.jit(weighted_vote)(placed["features"], placed["label"], queries)
        expected = brute_force(bank, labels, queries, counts=(1, 5, 20), temperature=temperature)
        np.testing.assert_array_equal(predicted, expected)


def test_all_images_vote_where_there_are_fewer_than_neighbours():
    """All of them vote, and nothing else."""
    bank = np.eye(3, dtype=np.float32)
    mesh = meshes()[8]
    placed = knn.split_bank(bank, np.array([4, 2, 2], np.int32), mesh=mesh)
    query = np.array([[0.8, 0.45, 0.4]], np.float32)
    query /= np.linalg.norm(query)
    for temperature, winner in ((0.05, 4), (10.0, 2)):
        weighted_vote = functools.partial(
            knn.weighted_vote, vote=vote((20,), temperature), mesh=mesh
        )
        predicted = jax.jit(weighted_vote)(placed["features"], placed["label"], query)
        assert predicted.tolist() == [[winner]]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("query_rows", [16, 1024])
def test_plain_arrays_of_any_length_equal_brute_force(devices, query_rows, monkeypatch):
    """Neither bank nor queries divide over the devices or the batches; some have no label."""
    monkeypatch.setattr(knn, "QUERY_ROWS", query_rows)
    rng = np.random.default_rng(6)
    # Features gather about a direction of their class; lengths differ and must not matter.
    directions = rng.normal(size=(CLASSES, 12))

    def rows(count):
        labels = rng.integers(0, CLASSES, count)
        noisy = directions[labels] + rng.normal(size=(count, 12))
        return noisy * rng.uniform(0.1, 9, (count, 1)), np.where(np.arange(count) % 9, labels, -1)

    (bank, labels), (queries, truth) = rows(101), rows(53)
    accuracy = knn.knn_accuracy(
        bank, labels, queries, truth, counts=(1, 7), temperature=0.1, mesh=meshes()[devices]
    )
    unit_bank, unit_queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)
    )
    predicted = brute_force(unit_bank, labels, unit_queries, counts=(1, 7), temperature=0.1)
    expected = (predicted == truth[:, None])[truth >= 0].mean(axis=0)
    assert list(accuracy) == [1, 7]
    np.testing.assert_allclose(list(accuracy.values()), expected, atol=1e-6)
    assert accuracy[7] > 0.3  # there is something to find


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": np.ones((2, 5))}, "queries: have 5 features, the bank has 4"),
        ({"bank": np.ones(4)}, "bank, queries: must have shapes"),
        ({"labels": np.zeros(2, int)}, r"labels: \(2,\) for 3 bank rows"),
        ({"query_labels": np.zeros(3, int)}, r"query_labels: \(3,\) for 2 queries"),
        ({"classes": 3}, "labels: 3 is not below classes = 3"),
        ({"counts": (0,)}, r"counts\[0\]: must be at least 1"),
        ({"counts": ()}, "counts: name at least one"),
        ({"temperature": 0.0}, "temperature: must be at least 0.0001"),
    ],
)
def test_arrays_that_do_not_fit_are_errors_with_their_names(changes, message):
    arguments = {
        "bank": np.ones((3, 4)),
        "labels": np.array([0, 3, 1]),
        "queries": np.ones((2, 4)),
        "query_labels": np.array([0, 1]),
    } | changes
    with pytest.raises(ConfigError, match=message):
        knn.knn_accuracy(**arguments)


@pytest.mark.slow
def test_accuracy_of_blocks_equals_brute_force_on_one_device_and_eight(frozen):
    """From images to accuracy; padding and unlabelled images neither vote nor count."""
    rng = np.random.default_rng(2)

    def batches(count, *, valid):
        """Every class is noise around its own colour; `valid` images, then padding."""
        labels = rng.integers(0, CLASSES, count).astype(np.int32)
        levels = 40 + 18 * labels[:, None, None, None] + rng.normal(size=(count, 32, 32, 3)) * 30
        images = np.clip(levels, 0, 255).astype(np.uint8)
        labels[3] = -1
        real = np.arange(count) < valid
        return [
            {"image": images[i : i + 16], "label": labels[i : i + 16], "valid": real[i : i + 16]}
            for i in range(0, count, 16)
        ]

    bank, queries = batches(64, valid=61), batches(48, valid=39)
    config = knn.KnnConfig(counts=(1, 7), temperature=0.1, blocks=(1, 3))
    accuracy = {
        n: knn.block_accuracy(
            frozen,
            bank=bank,
            queries=queries,
            classes=CLASSES,
            kind="cls_mean",
            config=config,
            mesh=mesh,
        )
        for n, mesh in meshes().items()
    }
    assert accuracy[1] == accuracy[8]

    def unit_features(batches):
        images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
        labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
        pixels = jnp.asarray(images / 127.5 - 1, jnp.float32)
        raw = compiled_features(frozen, pixels, blocks=(1, 3), kind="cls_mean")
        unit = raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)
        return np.asarray(unit).astype(features.STORED).astype(np.float64), labels

    (known, labels), (asked, truth) = unit_features(bank), unit_features(queries)
    for i, block in enumerate((1, 3)):
        predicted = brute_force(known[:, i], labels, asked[:, i], counts=(1, 7), temperature=0.1)
        expected = (predicted == truth[:, None])[truth >= 0].mean(axis=0)
        assert list(accuracy[8][block]) == [1, 7]
        np.testing.assert_allclose(list(accuracy[8][block].values()), expected, atol=1e-6)
        assert accuracy[8][block][7] > 0.3  # there is something to find
