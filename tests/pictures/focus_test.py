"""The focus command: from a source and weights to figures."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax.models.functional import functional
from beit_jax.models.vit import Encoder
from beit_jax.pictures import command, focus
from beit_jax.pretrained.encoder import encoder_of
from beit_jax.weights.description import Description
from tests.tiny import TINY


@pytest.fixture
def encoder():
    functions = functional(lambda rngs: Encoder(TINY, mask_token=True, final_norm=True, rngs=rngs))
    params = functions.init(jax.random.key(0))
    return encoder_of(params, Description(task="encoder", model=TINY, outputs=0))


@pytest.fixture
def pairs(tmp_path):
    """Six wide images; the square in the middle has class 1 on the left third."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    labels = np.full((24, 48), 255, np.uint8)
    labels[:, 12:20], labels[:, 20:36] = 1, 0
    for i in range(6):
        Image.fromarray(np.full((24, 48, 3), 40 * i, np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(labels).save(tmp_path / f"labels/{i}.png")
    return f"pairs:{tmp_path}"


def test_the_middle_of_images_and_maps_is_measured(pairs):
    images, labels = focus.labelled_images(pairs, count=4, size=24, ignore=255)
    assert images.shape == (4, 24, 24, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 40, 120, 200]  # evenly spread
    assert (labels[:, :, :8] == 1).all()
    assert (labels[:, :, 8:] == 0).all()


def test_a_model_that_looks_left_is_told_from_one_that_looks_nowhere(
    encoder, pairs, tmp_path, monkeypatch, capsys
):
    # The bias of keys one column to the left, at most: rows of offsets are (query - key).
    table = np.zeros((28, 4), np.float32)
    table[[3 + 5 * row for row in range(5)]] = 50.0
    bias = {"table": jax.numpy.asarray(table)}
    looks_left = dataclasses.replace(
        encoder, params={**encoder.params, "relative_position_bias": bias}
    )
    monkeypatch.setattr(focus, "load_encoder", lambda *_, **__: looks_left)
    output = tmp_path / "focus.json"
    arguments = ["focus", pairs, "--weights=w", "--count=6", "--batch-size=4", "--background", "1"]
    assert command.main([*arguments, f"--output={output}"]) == 0
    report = json.loads(output.read_text())
    assert report["images"] == 6
    for block in ("1", "2", "3"):
        trained, another, random = report["blocks"][block].values()
        assert trained["images"] == 6
        assert abs(random["lift"] - 1) < 0.05
        # Six patches of class 0 ask. Three look at class 1 and three at their own, which five of
        # the eight others have.
        assert abs(trained["lift"] - 0.5 / (5 / 8)) < 0.01
        assert abs(trained["lift"] - another["lift"]) < 0.01  # all images are alike to the bias
    assert "another image's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embedded", "--count=1"], "--count: 1; must be at least 2"),
        (["embedded", "--seed=-1"], "--seed: -1;"),
        (["embedded", "--output=/proc/x.json"], "--output: can't write /proc/x.json"),
        (["embedded", "--batch-size=0"], "--batch-size: 0; must be at least 1"),
        (["embedded", "--weights=/nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message, capsys):
    assert command.main(["focus", "--weights=w", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
