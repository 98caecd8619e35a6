"""What each picture looks like, seen from afar: 32 pixels wide, beside a stored one.

After a change that is meant: `python -m tests.pictures.golden_test`, and look at what it stored.
"""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax.config import DataConfig, MaskConfig
from beit_jax.drawing.chart import falling
from beit_jax.drawing.figure import figure, montage
from beit_jax.drawing.heat import scale
from beit_jax.pictures import attention, augment, command, masks, reconstruct, segments, tokens

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 32
SIZE, GRID = 32, 4


def images(count, size=SIZE):
    """Discs on gradients, of different colours."""
    y, x = np.mgrid[:size, :size] / size
    drawn = []
    for i in range(count):
        disc = (x - 0.3 - 0.1 * i) ** 2 + (y - 0.5) ** 2 < 0.05
        colours = np.stack([x, y, np.full_like(x, i / count)], axis=-1)
        drawn.append(np.where(disc[..., None], (1, 1, 0.2), colours))
    return np.rint(255 * np.stack(drawn)).astype(np.uint8)


def some_figure():
    shares = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    wide, high = images(1)[0, 8:24], images(1)[0, :, 8:20]
    return figure(
        [[wide, high], [high, wide]],
        title="A title",
        columns=["a wide one", "a high one"],
        labels=["first", "second"],
        captions=[["beneath", ""], ["", "beneath"]],
        chart=falling(shares, width=300, level=0.2, level_name="even", x_name="x", y_name="y"),
        legend=scale("0", "1"),
        note="A note that is longer than a line, so that it's broken into two of them here." * 2,
    ).pixels


def some_montage():
    return montage([some_figure()] * 2 + [some_figure()[:300]])


def some_attention():
    weights = np.full((2, 2, 17, 17), 0.2 / 16, np.float32)
    weights[..., 5] = 0.8
    return attention.attention_picture(
        images(1)[0], weights, block=2, points=[(0.5, 0.5)], per_head=True, name="disc.png"
    )


def stand_ins():
    """A model that says token 3 everywhere, and a tokenizer whose tokens are levels of grey."""
    grid = (GRID, GRID)

    def encode(pixels):
        blocks = pixels.reshape(len(pixels), GRID, SIZE // GRID, GRID, SIZE // GRID, 3)
        return jnp.asarray(blocks.mean(axis=(2, 4, 5)) / 256 * 8, jnp.int32)

    def decode(ids):
        side = SIZE // GRID
        return jnp.repeat(jnp.repeat(ids[..., None] / 8, side, 1), side, 2).repeat(3, -1)

    def predict(pixels, mask):
        return jnp.tile(8 * jax.nn.one_hot(3, 8), (len(pixels), GRID * GRID, 1))

    tokenizer = types.SimpleNamespace(
        encode=encode, decode=decode, vocabulary=8, grid=GRID, image_size=SIZE, paints=True
    )
    return predict, tokenizer, grid


def some_reconstruction():
    predict, tokenizer, grid = stand_ins()
    hidden = np.zeros((2, *grid), bool)
    hidden[:, 1:3] = True
    return reconstruct.reconstruction_picture(
        images(2),
        images(2),
        hidden,
        names=["a.png", "b.png"],
        model=predict,
        tokenizer=tokenizer,
        seed=0,
        masking="kind block",
    )


def some_tokens():
    _, tokenizer, _ = stand_ins()
    drawn = images(5)
    return tokens.tokens_picture(drawn, tokens.encoded(tokenizer, drawn), vocabulary=8)


def some_augment():
    mask = np.zeros((2, GRID, GRID), bool)
    mask[0, :2] = mask[1, :, 2:] = True
    batch = {"image": images(2), "token_image": images(2, 16).astype(np.float32), "mask": mask}
    config = DataConfig(source="embedded", mask=MaskConfig(kind="random"))
    originals = [images(1, 64)[0, :40], images(1, 64)[0, :, :40]]
    return augment.augment_picture(batch, names=["a", "b"], originals=originals, config=config)


def some_segments(folder):
    for i, image in enumerate(images(2)):
        Image.fromarray(image).save(folder / f"{i}.png")

    def of_patches(pixels):
        parts = pixels.reshape(len(pixels), GRID, SIZE // GRID, GRID, SIZE // GRID, 3)
        return parts.mean(axis=(2, 4)) / 255

    def weights(pixels, blocks):
        brightness = of_patches(pixels).mean(-1).reshape(-1)
        rows = np.concatenate([[0.0], brightness**4])
        return np.tile(rows / rows.sum(), (1, 1, 1, 17, 1))

    encoder = types.SimpleNamespace(
        config=types.SimpleNamespace(layers=2),
        image_size=SIZE,
        grid=GRID,
        blocks=lambda pixels, _: (types.SimpleNamespace(patches=of_patches(pixels)),),
        attention=weights,
    )
    options = command.parsed(
        ["segments", str(folder), "--weights=w", "--output=o", "--resize=squash"]
    )
    ((_, picture),) = segments.draw(encoder, options)
    return picture


def some_mask_picture():
    options = command.parsed(["masks", "--mask-kind=random", "--grid=4", "--output=o"])
    drawn = np.stack([np.arange(16).reshape(4, 4) % 5 == i % 5 for i in range(20)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "draw_masks", lambda *_, **__: drawn)
        ((_, picture),) = masks.draw(options)
    return picture


PICTURES = {
    "figure": some_figure,
    "montage": some_montage,
    "attention": some_attention,
    "reconstruct": some_reconstruction,
    "tokens": some_tokens,
    "augment": some_augment,
    "masks": some_mask_picture,
}


def from_afar(picture):
    height = round(picture.shape[0] * WIDTH / picture.shape[1])
    return Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.BOX)


def check_looks(name, picture):
    seen = np.asarray(from_afar(picture), np.int32)
    with Image.open(GOLDEN / f"{name}.png") as stored:
        expected = np.asarray(stored, np.int32)
    assert seen.shape == expected.shape
    apart = np.abs(seen - expected)
    # Letters may be drawn a little otherwise by another release of the font's renderer.
    assert apart.mean() < 2
    assert apart.max() < 40


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_looks_as_it_did(name):
    check_looks(name, PICTURES[name]())


def test_segments_look_as_they_did(tmp_path):
    check_looks("segments", some_segments(tmp_path))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        drawn = {name: draw() for name, draw in PICTURES.items()}
        drawn["segments"] = some_segments(Path(temporary))
    for each, picture in drawn.items():
        from_afar(picture).save(GOLDEN / f"{each}.png")
