"""Evaluation between steps: it says what a probe says, and health figures by hand."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.config.online import OnlineConfig
from beit_jax.data.sources import open_source
from beit_jax.tasks import online, pretrain
from beit_jax.tasks.feed import held_out_sample
from beit_jax.tasks.probe import ProbeConfig
from beit_jax.tasks.probe import run as run_probe
from beit_jax.training import metrics, sharding
from tests.tasks import tiny
from tests.tasks.probe_test import settings as probe_settings


def config(**online_settings):
    values = tiny.pretrain()
    values.run.steps = 6
    values.run.log_every = 6
    values.run.checkpoint_every = 4
    values.online.every = 4
    values.online.bank = 0
    values.online.queries = 0
    values.online.neighbours = 5
    values.online.block = 2
    values.online.eval_crop = 1.0
    for name, value in online_settings.items():
        values.online[name] = value
    return jobs.parse_job(values.to_dict())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("online"))
    pretrain.run(config(), workdir=workdir)
    return workdir, metrics.read(f"{workdir}/metrics.jsonl")


def same_images(workdir: str) -> ProbeConfig:
    """A probe of the run's last checkpoint, by the images and settings of `config`."""
    probe = probe_settings(workdir, linear=False, run__batch_size=8)
    data = dataclasses.replace(
        probe.data, source="embedded:64", holdout=12, normalization="imagenet"
    )
    return dataclasses.replace(
        probe, data=data, neighbours=dataclasses.replace(probe.neighbours, counts=(5,))
    )


@pytest.mark.slow
def test_knn_between_steps_is_that_of_the_probe_job(finished, tmp_path):
    workdir, lines = finished
    found = {line["step"]: line for line in lines if "online_seconds" in line}
    assert list(found) == [4, 6]
    assert json.loads((Path(workdir) / "start.json").read_text())["online_classes"] == 6
    probed = run_probe(same_images(workdir), workdir=str(tmp_path))["knn"]["accuracy"]
    assert found[6]["online_knn_accuracy"] == probed["2"]["5"]
    assert 0 < found[6]["online_knn_accuracy"] < 1  # 12 images of 6 classes
    # Own lines, after the held-out ones of the same step.
    assert [sorted(line)[:2] for line in lines if line["step"] == 6][1:] == [
        ["eval_loss", "eval_mlm_acc"],
        ["online_codes_share", "online_knn_accuracy"],
    ]
    for line in found.values():
        assert 1 <= line["online_rankme"] <= 12
        assert 1 / 64 <= line["online_codes_share"] <= 1
        assert 0 <= line["online_token_entropy"] <= np.log(64)


def test_images_without_classes_have_no_knn(caplog):
    settings = config()
    source = open_source(settings.data, training=True)
    bare = dataclasses.replace(source, classes=())
    arguments = {"data": settings.data, "run": settings.run}
    with caplog.at_level("INFO"):
        found = online.labelled_images(settings.online, sources=(bare, bare), **arguments)
    assert found is None
    assert "no k-NN between steps" in caplog.text


def test_more_neighbours_than_images_are_refused():
    settings = config(neighbours=65)
    sources = tuple(open_source(settings.data, training=training) for training in (True, False))
    with pytest.raises(ConfigError, match=r"config\.online\.neighbours: 65, but 64 images vote"):
        online.labelled_images(
            settings.online, data=settings.data, run=settings.run, sources=sources
        )


def test_another_set_is_named_by_its_own_settings(tmp_path):
    settings = config(source=f"folder:{tmp_path}/none", holdout=2)
    with pytest.raises(ConfigError, match=r"config\.online\.source: no such folder"):
        online.labelled_images(
            settings.online, data=settings.data, run=settings.run, sources=(None, None)
        )
    with pytest.raises(ConfigError, match=r"holdout: 2 would have no effect without source"):
        OnlineConfig(holdout=2)
    with pytest.raises(ConfigError, match=r"^split: 'test' would have no effect without source"):
        OnlineConfig(split="test")


def test_a_block_that_the_encoder_lacks_is_refused_with_the_settings():
    with pytest.raises(ConfigError, match=r"config\.online\.block: there is no block 9, .* has 2"):
        config(block=9)


def test_the_number_of_classes_is_known_at_the_start():
    settings = config()
    found = online.online_evaluation(
        settings.online,
        data=settings.data,
        run=settings.run,
        model=settings.model,
        vocabulary=64,
        sources=tuple(open_source(settings.data, training=part) for part in (True, False)),
        mesh=sharding.make_mesh(fsdp=1),
    )
    assert found.known == {"online_classes": 6}


def test_a_part_is_evenly_spaced_and_kept():
    settings = config()
    source = open_source(settings.data, training=False)
    read = online.held_out_images(
        dataclasses.replace(settings.online, queries=4),
        data=settings.data,
        run=settings.run,
        grid=4,
        evaluation=source,
    )
    first, second = list(read()), list(read())
    assert len(first) == len(second) == 1
    assert first[0]["image"] is second[0]["image"]
    assert first[0]["valid"].sum() == 4
    whole = online.held_out_images(
        settings.online, data=settings.data, run=settings.run, grid=4, evaluation=source
    )
    images = np.concatenate([batch["image"] for batch in whole()])
    np.testing.assert_array_equal(first[0]["image"][:4], images[[0, 3, 6, 9]])


def test_pictures_show_a_spread_over_the_held_out_images():
    settings = config()
    source = open_source(settings.data, training=False)
    keys = ("image", "mask")
    arguments = {"grid": 4, "keys": keys}
    sample = held_out_sample(settings.data, source, **arguments, count=3)
    everything = held_out_sample(settings.data, source, **arguments, count=20)
    assert set(sample) == set(keys)
    assert len(everything["image"]) == len(source) == 12
    np.testing.assert_array_equal(sample["image"], everything["image"][[0, 4, 8]])


def test_rankme_is_the_effective_rank():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert online.rankme(basis) == pytest.approx(8)
    assert online.rankme(basis[:, :3] @ basis[:3]) == pytest.approx(3)
    assert online.rankme(np.ones((5, 4))) == pytest.approx(1)
    # By the definition: singular values 3 and 1.
    shares = np.array([0.75, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert online.rankme(np.diag([3.0, 1.0])) == pytest.approx(expected)
    assert np.isnan(online.rankme(np.full((2, 2), np.inf)))
    assert np.isnan(online.rankme(np.zeros((2, 2))))


def test_predictions_are_counted_where_patches_are_hidden(monkeypatch):
    """A model whose token is the patch's number: one image, padded, with two hidden patches."""
    spec = online.FeatureSpec(blocks=(1,))
    whole = online.masked_image_model(config().model, vocabulary=64)
    monkeypatch.setattr(
        type(whole),
        "apply",
        lambda self, params, pixels, **rest: np.eye(16)[None].repeat(pixels.shape[0], 0),
    )
    monkeypatch.setattr(online, "image_features", lambda *args, **rest: jax.numpy.zeros((2, 1, 3)))
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0, 1] = mask[0, 3, 3] = mask[1, 2, 2] = True
    batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "mask": mask}
    batch["valid"] = np.array([True, False])
    _, valid, counts = online._look({"encoder": {}}, batch, functions=None, whole=whole, spec=spec)
    assert valid.tolist() == [True, False]
    assert np.flatnonzero(counts).tolist() == [1, 15]
