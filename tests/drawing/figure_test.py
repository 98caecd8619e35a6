"""Figures: nothing overlaps or is cut, and maps lie where their patches are."""

import itertools

import numpy as np
import pytest

from beit_jax.drawing import figure, text

LONG = "a very long caption that can't fit the cell that it stands above, however it is broken"


def picture(height, width, level=200):
    return np.full((height, width, 3), level, np.uint8)


@pytest.mark.parametrize("cell", [96, 224])
def test_no_texts_or_pictures_overlap_or_are_cut(cell):
    shapes = [(300, 20), (20, 300), (64, 64)]
    rows = [[picture(*shape) for shape in shapes], [picture(*shape) for shape in shapes[::-1]]]
    whole, boxes = figure.lay_out(
        rows,
        title=f"{LONG} {LONG} {LONG}",
        columns=[LONG, "b", "averylongwordwithoutanyspaceatwhichitcouldbebrokenintotwolines"],
        labels=[LONG * 4, ""],
        note=LONG * 10,
        cell=cell,
    )
    height, width, _ = whole.shape
    for box in boxes:
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
    for a, b in itertools.combinations(boxes, 2):
        apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
        assert apart, (a, b)
    pictures = [box for box in boxes if not box.text]
    for box, shape in zip(pictures, [*shapes, *shapes[::-1]], strict=True):
        ratio = (box.right - box.left) / (box.bottom - box.top)
        assert ratio == pytest.approx(shape[1] / shape[0], rel=0.15)
        assert (whole[box.top : box.bottom, box.left : box.right] == 200).all()
    for box in boxes:  # every text is really there
        assert not box.text or whole[box.top : box.bottom, box.left : box.right].min() < 150


def test_heat_covers_exactly_the_pixels_of_its_patch():
    image = np.zeros((24, 24, 3), np.uint8)
    values = np.zeros((4, 4))
    values[1, 2] = 0.3
    over = figure.heat(values, over=image)
    lit = (over != over[0, 0]).any(axis=-1)
    expected = np.zeros((24, 24), bool)
    expected[6:12, 12:18] = True
    np.testing.assert_array_equal(lit, expected)
    np.testing.assert_array_equal(figure.heat(values)[1, 2], (253, 231, 37))
    np.testing.assert_array_equal(figure.heat(values, largest=3.0)[0, 0], (68, 1, 84))
    assert (figure.heat(np.zeros((2, 2))) == (68, 1, 84)).all()


def test_brighter_is_lighter():
    light = figure.colours(np.linspace(0, 1, 50)[None])[0].astype(int) @ (2126, 7152, 722)
    assert (np.diff(light) > 0).all()


def test_a_frame_lies_on_its_patch():
    framed = figure.outlined(np.full((32, 32, 3), 90, np.uint8), patch=(1, 2), grid=4)
    inside = framed[8:16, 16:24]
    assert (inside[0] == 255).all()
    assert (inside[:, -1] == 255).all()
    assert (inside[1:-1, 1:-1] == 90).all()


def test_wrapping():
    lines = text.wrap(LONG, width=120, most=3)
    assert len(lines) == 3
    assert all(text.width_of(line) <= 120 for line in lines)
    assert lines[-1].endswith("…")
    assert text.wrap("", width=50) == []
    assert text.wrap("a b", width=500) == ["a b"]
