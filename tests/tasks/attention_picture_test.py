"""The picture of attention in training: of an encoder whose attention is known."""

import numpy as np

from beit_jax.config import ModelConfig
from beit_jax.drawing.heat import heat
from beit_jax.evaluation.features import frozen_encoder
from beit_jax.tasks import attention_picture as module


def test_the_maps_are_those_of_the_encoder(monkeypatch):
    """Every token attends to patch (0, 1) alone: its place is the brightest colour, all else dark
    or the image in grey."""
    model = ModelConfig(
        **{"layers": 1, "width": 8, "heads": 2, "mlp_width": 8, "image_size": 16, "patch_size": 8}
    )
    encoder, _ = frozen_encoder(model, {})
    weights = np.zeros((6, 5, 5), np.float32)
    weights[:, :, 2] = 1  # the class token, (0, 0), then (0, 1)
    shown = []

    def drawn(rows, **rest):
        shown.extend(rows)
        return type("Drawn", (), {"pixels": np.zeros((1, 1, 3), np.uint8)})

    monkeypatch.setattr(module, "_weigh", lambda *args, **rest: weights[: len(args[1])])
    monkeypatch.setattr(module, "figure", drawn)
    images = np.full((6, 16, 16, 3), 200, np.uint8)
    params = {"encoder": {}}
    arguments = {"encoder": encoder, "block": 1, "normalization": "half"}
    module.attention_picture(params, images=images, **arguments)
    assert [len(row) for row in shown] == [4] * module.IMAGES
    bright, dark = heat(np.array([[1.0, 0.0]]), largest=1.0)[0].astype(float)
    for row in shown:
        np.testing.assert_array_equal(row[0], images[0])
        for picture in (row[1], row[3]):
            assert np.abs(picture[:8, 8:] - (0.4 * 200 + 0.6 * bright)).max() <= 1
            assert np.abs(picture[8:] - (0.4 * 200 + 0.6 * dark)).max() <= 1
        changed = np.argwhere((row[2] != images[0]).any(axis=-1))
        assert changed.min() >= 8  # the patch in the middle of 2 × 2 is the last
