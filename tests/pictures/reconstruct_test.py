"""Reconstructions from the command line: what fits together, and what does not."""

import types

import numpy as np
import pytest
from PIL import Image

from beit_jax.pictures import command, masks, reconstruct
from tests.pictures.golden_test import GRID, SIZE, images, stand_ins


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    predict, tokenizer, _ = stand_ins()

    class Model:
        grid, image_size, vocabulary = GRID, SIZE, 8
        __call__ = staticmethod(predict)

    def some_masks(config, *, count, grid, seed):
        assert (config.kind, config.count) == ("random", 8)
        drawn = np.zeros((count, grid, grid), bool)
        drawn[:, :2] = True
        return drawn

    monkeypatch.setattr(reconstruct, "load_masked_image_model", lambda *_, **__: Model())
    monkeypatch.setattr(reconstruct, "load_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.setattr(masks, "draw_masks", some_masks)
    Image.fromarray(images(1)[0]).save(tmp_path / "a.png")
    path = tmp_path / "new" / "r.png"
    given = ["reconstruct", str(tmp_path / "a.png"), "--weights=w", f"--output={path}"]
    return [*given, "--mask-kind=random", "--mask-ratio=0.5"], tokenizer, path


def test_one_file_is_written(arguments, capsys):
    given, _, path = arguments
    assert command.main(given) == 0, capsys.readouterr().err
    with Image.open(path) as picture:
        assert picture.width > 5 * SIZE


@pytest.mark.parametrize(
    ("wrong", "said"), [({"paints": False}, "no decoder"), ({"vocabulary": 9}, "9 tokens")]
)
def test_a_tokenizer_that_does_not_fit_is_one_line(arguments, wrong, said, capsys):
    given, tokenizer, path = arguments
    vars(tokenizer).update(wrong)
    assert command.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not path.exists()


def test_the_grid_of_a_tokenizer_follows_the_model(monkeypatch):
    def load(source, *, image_size=32):
        return types.SimpleNamespace(image_size=image_size, grid=image_size // 8, paints=True)

    monkeypatch.setattr(reconstruct, "load_tokenizer", load)
    assert reconstruct.painter("t", grid=6).image_size == 48
