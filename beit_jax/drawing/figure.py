"""A figure: a title, rows of pictures of any shape under captions, and a note. One style for all.

    figure([[image, over(image, heat(attention))]], title="Attention", columns=["image", "head 1"])

Pictures are uint8 `[h, w, 3]`; `heat.py` makes them of maps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.drawing.text import FAINT, INK, LINE, PAPER, TEXT, width_of, wrap, write

_GAP = 8
_TITLE = 18  # pixels
_CELL = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """Where something lies in a figure, in pixels: a text, or a picture.

    Attributes:
      left, top, right, bottom: of the rectangle, the last two exclusive.
      text: what is written there; "" for a picture.
    """

    left: int
    top: int
    right: int
    bottom: int
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Figure:
    """A figure that is drawn.

    Attributes:
      pixels: uint8 `[H, W, 3]`.
      boxes: of all texts and pictures; none overlap.
    """

    pixels: np.ndarray
    boxes: list[Box]


def figure(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    title: str,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    note: str = "",
    cell: int = _CELL,
) -> Figure:
    """Lays pictures out in rows.

    Args:
      rows: of uint8 pictures `[h, w, 3]`; sizes and shapes may differ.
      title: above everything.
      columns: a caption for each picture of a row; none by default.
      labels: what each row shows, such as a file's name; "" for a row without, none by default.
      note: below everything, wrapped.
      cell: the side, in pixels, of the square that each picture is fitted into.
    """
    across = max(len(row) for row in rows)
    width = max(across * (cell + _GAP) + _GAP, 2 * _CELL)
    inner = width - 2 * _GAP
    placed: list[tuple[Box, int, tuple[int, int, int]]] = []  # texts with their size and ink
    pasted: list[tuple[Box, Image.Image]] = []

    def put(text: str, left: int, top: int, size: int, ink: tuple[int, int, int]) -> None:
        right = left + int(np.ceil(width_of(text, size=size)))
        box = Box(left=left, top=top, right=right, bottom=top + size + 4, text=text)
        placed.append((box, size, ink))

    top = _GAP
    for line in wrap(title, width=inner, size=_TITLE):
        put(line, _GAP, top, _TITLE, INK)
        top += _TITLE + _GAP
    wrapped = [wrap(caption, width=cell, most=2) for caption in columns]
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            put(line, _GAP + column * (cell + _GAP), top + i * LINE, TEXT, INK)
    top += max((len(lines) for lines in wrapped), default=0) * LINE
    for number, row in enumerate(rows):
        for line in wrap(labels[number] if labels else "", width=inner, most=1):
            put(line, _GAP, top, TEXT, FAINT)
            top += LINE
        fitted = [_fitted(picture, cell=cell) for picture in row]
        tallest = max(each.height for each in fitted)
        for column, each in enumerate(fitted):
            left = _GAP + column * (cell + _GAP) + (cell - each.width) // 2
            y = top + (tallest - each.height) // 2
            box = Box(left=left, top=y, right=left + each.width, bottom=y + each.height)
            pasted.append((box, each))
        top += tallest + _GAP
    for line in wrap(note, width=inner, most=6):
        put(line, _GAP, top, TEXT, FAINT)
        top += LINE
    return _composed(placed, pasted, size=(width, top + _GAP))


def _composed(
    placed: Sequence[tuple[Box, int, tuple[int, int, int]]],
    pasted: Sequence[tuple[Box, Image.Image]],
    *,
    size: tuple[int, int],
) -> Figure:
    """Texts, each with its size and ink, and pictures on one sheet of (width, height) pixels."""
    whole = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(whole)
    for box, text_size, ink in placed:
        write(draw, (box.left, box.top), box.text, width=size[0], ink=ink, size=text_size)
    for box, each in pasted:
        whole.paste(each, (box.left, box.top))
    boxes = [*(box for box, *_ in placed), *(box for box, _ in pasted)]
    return Figure(pixels=np.asarray(whole), boxes=boxes)


def _fitted(picture: np.ndarray, *, cell: int) -> Image.Image:
    """A picture enlarged or reduced into a cell; enlarged pixels stay squares."""
    image = Image.fromarray(picture)
    factor = cell / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return image.resize(size, smooth)
