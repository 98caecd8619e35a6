"""The two views of a config's training images."""

import numpy as np
import pytest

from beit_jax.config import AugmentConfig, DataConfig, MaskConfig
from beit_jax.pictures import augment, command


@pytest.mark.slow
def test_both_views_show_the_same_part():
    config = DataConfig(
        source="embedded",
        holdout=8,
        image_size=32,
        token_image_size=32,
        augment=AugmentConfig(fidelity="fast"),  # whose jitter is left to the device
        mask=MaskConfig(kind="random", count=4),
    )
    batch, names, originals = augment.training_batch(config, grid=4, seed=3, count=2)
    first, second = (np.asarray(batch[name], np.float32) for name in ("image", "token_image"))
    assert np.abs(first - second).mean() < 12
    assert np.abs(first - second[::-1]).mean() > 24
    assert (batch["mask"].sum(axis=(1, 2)) == 4).all()
    assert len(names) == len(originals) == 2
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--config=configs/beit_base_ft1k.py"], "classify"),
        ([], "--config"),
        (["--config=configs/quickstart.py", "--count=0"], "--count"),
        (["--config=configs/quickstart.py", "--config.pretrain.nothing=0"], "pretrain.nothing"),
    ],
)
def test_what_has_no_two_views_is_one_line(given, said, tmp_path, capsys):
    assert command.main(["augment", *given, f"--output={tmp_path}/a.png"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
