"""Scores against scikit-learn; counts beyond what int32 and float32 hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from beit_jax.config import ConfigError
from beit_jax.segmentation import confusion

NAMES = ("sky", "road", "tree", "car", "pole", "fence")
CLASSES = len(NAMES)


def random_maps(seed, *, missing=(3, 5)):
    """Scores, labels with ignored pixels; class 3 is only predicted, class 5 nowhere."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, 1, 2, 4], (4, 9, 11)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape))
    labels[rng.random(labels.shape) < 0.2] = 255
    scores = rng.normal(size=(4, CLASSES, 9, 11)).astype(np.float32)
    np.put_along_axis(scores, predicted[:, None].astype(int), 9.0, axis=1)
    return scores, predicted.astype(np.uint8), labels


@functools.cache
def compiled(*, passes=1):
    return jax.jit(functools.partial(confusion.add, passes=passes))


def test_scores_equal_scikit_learn():
    sums, maps = confusion.empty(CLASSES), []
    for seed in range(3):
        scores, predicted, labels = random_maps(seed)
        sums = compiled()(sums, scores, labels)
        maps.append((predicted, labels, scores))
    predicted, labels = (np.stack([each[i] for each in maps]) for i in (0, 1))
    found = confusion.scores(sums, names=NAMES)
    compared = confusion.compare(predicted, labels, names=NAMES)
    assert compared.items() <= found.items()

    counted = labels < 255
    truth, guess = labels[counted], predicted[counted]
    present = [0, 1, 2, 3, 4]
    iou = jaccard_score(truth, guess, labels=present, average=None)
    assert {name for name in found if name.startswith("iou/")} == {
        f"iou/{NAMES[i]}" for i in present
    }
    for i in present:
        assert found[f"iou/{NAMES[i]}"] == pytest.approx(iou[i], abs=1e-12)
    assert found["iou/car"] == 0  # predicted, never labelled
    assert found["miou"] == pytest.approx(iou.mean())
    labelled = [0, 1, 2, 4]
    assert found["macc"] == pytest.approx(
        recall_score(truth, guess, labels=labelled, average="macro")
    )
    matrix = confusion_matrix(truth, guess, labels=range(CLASSES))
    assert found["aacc"] == pytest.approx(np.trace(matrix) / matrix.sum())
    whole = np.asarray(sums["predicted"]) @ [1024, 1]
    np.testing.assert_array_equal(whole, matrix.sum(axis=0))


def test_the_loss_is_the_mean_cross_entropy():
    scores, _, labels = random_maps(0)
    logs = np.asarray(jax.nn.log_softmax(scores, axis=1))
    picked = np.take_along_axis(logs, np.minimum(labels, 5)[:, None].astype(int), axis=1)[:, 0]
    expected = -picked[labels < 255].mean()
    sums = compiled()(confusion.empty(CLASSES), scores, labels)
    assert confusion.scores(sums, names=NAMES)["loss"] == pytest.approx(expected, rel=1e-5)
    # Probabilities summed over twelve passes.
    shares = 12 * np.exp(logs)
    sums = compiled(passes=12)(confusion.empty(CLASSES), shares, labels)
    assert confusion.scores(sums, names=NAMES)["loss"] == pytest.approx(expected, rel=1e-5)


def test_counts_beyond_int32_are_exact():
    """The sums of 2^12 batches of two million pixels each, of an odd number of them right."""
    scores, _, labels = random_maps(0)
    sums = compiled()(confusion.empty(CLASSES), scores, labels)
    small = {name: np.asarray(sums[name]) @ [1024, 1] for name in confusion.COUNTS}
    batch = {name: small[name] * 2_000_003 % 3_000_017 for name in confusion.COUNTS}
    halves = {
        name: jnp.stack([count // 1024, count % 1024], axis=-1).astype(jnp.int32)
        for name, count in batch.items()
    } | {"loss": jnp.float32(0)}
    total = halves
    for _ in range(12):  # doubled, as adding batches does
        total = jax.tree.map(jnp.add, total, total)
    for name in confusion.COUNTS:
        exact = batch[name].astype(np.int64) * 4096
        np.testing.assert_array_equal(np.asarray(total[name]).astype(np.int64) @ [1024, 1], exact)
    assert (batch["labelled"] * 4096).max() > 2**32
    # One more image on top still carries.
    more = compiled()(total, scores, labels)
    expected = batch["labelled"].astype(np.int64) * 4096 + small["labelled"]
    np.testing.assert_array_equal(
        np.asarray(more["labelled"]).astype(np.int64) @ [1024, 1], expected
    )
    assert (np.asarray(more["labelled"])[:, 1] < 1024).all()


def test_without_labels_scores_are_not_numbers():
    scores = confusion.scores(confusion.empty(2), names=("a", "b"))
    assert scores.keys() == {"miou", "macc", "aacc", "loss"}
    assert all(np.isnan(value) for value in scores.values())
    nothing = np.full((3, 4), 255, np.uint8)
    assert np.isnan(confusion.compare(np.zeros((3, 4), np.uint8), nothing, names=("a",))["miou"])


def test_a_name_for_every_class():
    with pytest.raises(ConfigError, match=r"^names: 1 for 2 classes$"):
        confusion.scores(confusion.empty(2), names=("a",))
