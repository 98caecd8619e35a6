"""Attention pictures and segments from image files."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax.drawing.heat import heat, over
from beit_jax.models.functional import functional
from beit_jax.models.vit import Encoder
from beit_jax.pictures import attention, command, inputs, masks
from beit_jax.pretrained.encoder import encoder_of
from beit_jax.weights.description import Description
from tests.tiny import TINY

SIZE = 192  # pictures of this size are shown as they are


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(30, 60, 3), (60, 30, 3), (24, 24, 3)]):
        pixels = rng.integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def test_an_overlay_lights_up_the_patch_attended_to_and_no_other_pixel():
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    weights = np.zeros((2, 1, 10, 10), np.float32)
    weights[..., 0] = 1
    weights[1, :, 1 + 4, :] = np.eye(10)[1 + 2]  # the middle attends to the patch (0, 2)
    picture = attention.attention_picture(
        image, weights, block=2, points=[(0.5, 0.5)], per_head=False, name="x"
    )
    patch = np.zeros((SIZE, SIZE))
    patch[:64, 128:] = 1
    for expected in (heat(patch), over(image, heat(patch))):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (SIZE, SIZE, 3))
        # Only where the corner fits are whole pictures compared.
        corners = np.argwhere((picture[: -SIZE + 1, : -SIZE + 1] == expected[0, 0]).all(axis=-1))
        assert any((windows[row, column, 0] == expected).all() for row, column in corners)


def test_both_kinds_write_their_pictures(photos, tmp_path, monkeypatch, capsys):
    functions = functional(lambda rngs: Encoder(TINY, mask_token=True, final_norm=True, rngs=rngs))
    params = functions.init(jax.random.key(0))
    encoder = encoder_of(params, Description(task="encoder", model=TINY, outputs=0))
    monkeypatch.setattr(command, "load_encoder", lambda *_, **__: dataclasses.replace(encoder))
    output = tmp_path / "drawn"
    for kind in command.KINDS:
        arguments = [kind, str(photos), "--weights=w", f"--output={output}", "--block=2"]
        assert command.main(arguments) == 0, capsys.readouterr().err
    names = sorted(path.name for path in output.iterdir())
    assert names == [*(f"attention_0{i + 1}_{i}.png" for i in range(3)), "segments.png"]
    for block in ("0", "4"):
        assert command.main([*arguments, f"--block={block}"]) == 2
        assert "blocks 1 to 3" in capsys.readouterr().err


def test_points_are_of_the_image_not_of_the_grid():
    assert inputs.patch_at((0.9, 0.1), grid=3) == (0, 2)
    assert inputs.patch_at((1.0, 1.0), grid=3) == (2, 2)
    with pytest.raises(Exception, match="0 to 1"):
        inputs.point("2,0")


def test_what_can_not_be_read_is_named(photos):
    (photos / "3.png").write_bytes(b"no image")
    for wrong in ("3.png", "4.png"):
        options = command.parsed(["attention", str(photos / wrong), "--weights=w", "--output=o"])
        with pytest.raises(Exception, match=wrong):
            inputs.load_inputs(options, size=24)


def test_masks(tmp_path):
    arguments = [
        "masks",
        "--mask-kind=random",
        "--mask-count=4",
        "--grid=4",
        f"--output={tmp_path}/m",
    ]
    assert command.main(arguments) == 0
    with Image.open(tmp_path / "m" / "masks.png") as image:
        dark = (np.asarray(image) == 60).all(axis=-1).sum()
    # Sixteen masks, a quarter of each dark, less the lines between patches; letters have edges.
    assert 0 <= dark - 16 * 4 * 13 * 13 < 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mask-kind=none"], "none"),
        (["--mask-count=300"], "300"),
        (["--mask-ratio=1.5"], "1.5"),
        (["--config=/no/such.py"], "/no/such.py"),
        (
            ["--config=configs/beit_base_ft1k.py", "--config.data.source=embedded"],
            "--config: it has no masks",
        ),
    ],
)
def test_masks_that_fit_no_grid_are_one_line(arguments, said, tmp_path, capsys):
    assert command.main(["masks", *arguments, f"--output={tmp_path}/m"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "m").exists()


def test_overrides_reach_the_config_wherever_they_stand(capsys):
    arguments = ["masks", "--config.data.mask.count=9", "--output=o", "--config=f"]
    assert command.parsed(arguments).overrides == ["--config.data.mask.count=9"]
    with pytest.raises(SystemExit):
        command.parsed(["masks", "--config.data.mask.count=9", "--output=o"])
    assert "--config=FILE" in capsys.readouterr().err


def test_masks_scale_with_the_grid_and_a_ratio_is_a_count():
    options = command.parsed(["masks", "--output=o"])
    assert masks.mask_config(options, grid=14).count == 75
    assert masks.mask_config(options, grid=4).count == 6
    options = command.parsed(["masks", "--output=o", "--mask-kind=random", "--mask-ratio=0.5"])
    config = masks.mask_config(options, grid=4)
    assert (config.kind, config.count) == ("random", 8)
    assert "aspect" not in masks.described(config)
