"""Colours are far apart; sheets show every row undistorted and name every class that occurs."""

import io

import numpy as np
import pytest
from PIL import Image

from beit_jax.drawing import class_maps, text
from beit_jax.drawing.class_maps import overlay, paint, palette, save_class_map, sheet

NAMES = ("sky", "road", "a class whose name goes on and on beyond any reasonable length", "car")


def swatches(picture):
    """The palette's colours that are ten pixels wide somewhere, which no letter's edge is."""
    width = picture.shape[1] - 9
    first = picture[:, :width]
    wide = np.all([picture[:, i : width + i] == first for i in range(10)], axis=(0, -1))
    colors = {tuple(color) for color in palette().tolist()}
    return {tuple(pixel) for pixel in np.unique(first[wide], axis=0).tolist()} & colors


def test_colours_are_far_apart_and_none_looks_ignored():
    colors = palette().astype(int)
    assert len(np.unique(colors, axis=0)) == 256
    assert colors[255].tolist() == [128, 128, 128]
    lab = class_maps._cielab(colors)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e9 * np.eye(256)
    # A difference of 2.3 is just noticeable.
    for classes, least in ((12, 40), (60, 20), (150, 13), (256, 10)):
        shown = [*range(classes - 1), 255]
        assert distances[np.ix_(shown, shown)].min() > least


def test_cielab_of_known_colours():
    """Values from the standard's tables: white, black, red."""
    rgb = np.asarray([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]
    np.testing.assert_allclose(class_maps._cielab(rgb), expected, atol=0.05)


def test_an_overlay_mixes_and_leaves_what_is_ignored():
    image = np.full((2, 2, 3), 100, np.uint8)
    classes = np.array([[0, 1], [255, 0]], np.uint8)
    mixed = overlay(image, classes, alpha=0.25)
    np.testing.assert_array_equal(mixed[1, 0], [100, 100, 100])
    exact = 75 + 0.25 * palette()[1]
    assert np.abs(mixed[0, 1] - exact).max() <= 0.5
    np.testing.assert_array_equal(overlay(image, classes, alpha=1.0)[0, 0], palette()[0])


def test_a_saved_map_holds_classes_and_shows_colours(tmp_path):
    classes = np.random.default_rng(0).integers(0, 256, (5, 9)).astype(np.uint8)
    save_class_map(str(tmp_path / "map.png"), classes)
    with Image.open(io.BytesIO((tmp_path / "map.png").read_bytes())) as picture:
        np.testing.assert_array_equal(np.asarray(picture), classes)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), paint(classes))


@pytest.mark.parametrize("size", [(360, 480), (4, 4), (200, 250), (30, 300), (700, 70), (1, 900)])
def test_pictures_fill_their_cells_undistorted(size):
    """The quarters of a map stay quarters, at whatever size and shape."""
    h, w = size
    classes = np.zeros(size, np.uint8)
    classes[h // 2 :, : w // 2], classes[h // 2 :, w // 2 :] = 1, 3
    image = np.full((h, w, 3), 200, np.uint8)
    picture = sheet({"image": [image], "label": [classes]}, names=NAMES)
    gap, line = class_maps._GAP, text.LINE
    cell = min(max(h, w, 192), 320)  # a little picture is enlarged, a large one reduced
    assert picture.shape[1] == 2 * (cell + gap) + gap
    factor = cell / max(size)
    shown = max(1, round(h * factor)), max(1, round(w * factor))
    area = picture[line : line + shown[0], cell + 2 * gap : 2 * (cell + gap)]
    for c in (1, 3):
        share = (area == palette()[c]).all(axis=-1).sum() / np.prod(shown)
        expected = (classes == c).mean()
        assert share == pytest.approx(expected, abs=0.04)
    assert swatches(picture[line + shown[0] + gap :]) == {
        tuple(palette()[c].tolist()) for c in np.unique(classes)
    }


def test_the_legend_names_what_occurs_in_any_row():
    maps = [np.full((8, 8), c, np.uint8) for c in (0, 2)]
    predictions = [np.full((8, 8), c, np.uint8) for c in (255, 9)]
    picture = sheet({"label": maps, "prediction": predictions}, names=NAMES, titles=("a", "b"))
    gap, line = class_maps._GAP, text.LINE
    legend = picture[line + 2 * (line + 192 + gap) :]
    assert swatches(legend) == {tuple(palette()[c].tolist()) for c in (0, 2, 9, 255)}
    # Nothing of a name is beyond the right edge.
    assert (legend[:, -gap:] == 255).all()


@pytest.mark.parametrize("classes", [11, 150])
def test_the_legend_wraps_to_hold_every_class(classes):
    every = np.arange(classes, dtype=np.uint8)[None].repeat(2, axis=0)
    names = [f"thing {c}" for c in range(classes)]
    picture = sheet({"label": [every]}, names=names)
    above = text.LINE + round(2 * 192 / classes) + class_maps._GAP
    assert len(swatches(picture[above:])) == classes


def test_names_are_one_line_and_cut_where_they_are_long():
    cut = text.cut(NAMES[2], width=100)
    assert cut.endswith("…")
    assert NAMES[2].startswith(cut[:-1])
    assert 80 < text.width_of(cut) <= 100
    assert text.cut("a\n  b", width=100) == "a b"
    assert class_maps._name(4, NAMES) == "class 4"
