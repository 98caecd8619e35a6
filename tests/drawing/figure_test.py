"""Figures: nothing overlaps or is cut."""

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
    drawn = figure.figure(
        rows,
        title=f"{LONG} {LONG} {LONG}",
        columns=[LONG, "b", "averylongwordwithoutanyspaceatwhichitcouldbebrokenintotwolines"],
        labels=[LONG * 4, ""],
        captions=[[LONG, "", "c"], ["", LONG, ""]],
        chart=picture(50, 700),
        legend=picture(20, 90),
        note=LONG * 10,
        cell=cell,
    )
    whole, boxes = drawn.pixels, drawn.boxes
    height, width, _ = whole.shape
    for box in boxes:
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
    for a, b in itertools.combinations(boxes, 2):
        apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
        assert apart, (a, b)
    first, *pictures, last = (box for box in boxes if not box.text)
    assert (first.right - first.left, last.bottom - last.top) == (700, 20)
    for box, shape in zip(pictures, [*shapes, *shapes[::-1]], strict=True):
        ratio = (box.right - box.left) / (box.bottom - box.top)
        assert ratio == pytest.approx(shape[1] / shape[0], rel=0.15)
        assert (whole[box.top : box.bottom, box.left : box.right] == 200).all()
    for box in boxes:  # every text is really there
        assert not box.text or whole[box.top : box.bottom, box.left : box.right].min() < 150


def test_wrapping():
    lines = text.wrap(LONG, width=120, most=3)
    assert len(lines) == 3
    assert all(text.width_of(line) <= 120 for line in lines)
    assert lines[-1].endswith("…")
    assert text.wrap("", width=50) == []
    assert text.wrap("a b", width=500) == ["a b"]


def test_what_the_font_lacks_is_replaced():
    assert text.drawable("façade ± 1…") == "facade ± 1…"
    assert text.drawable("14 × 14") == "14 x 14"
    assert text.drawable("写真.jpg") == "??.jpg"
    assert text.cut("写", width=100) == "?"


@pytest.mark.parametrize(
    ("size", "side"), [(24, 192), (64, 192), (128, 256), (224, 224), (512, 320)]
)
def test_small_pictures_are_enlarged_by_a_whole_number(size, side):
    assert figure.shown_side(size) == side
