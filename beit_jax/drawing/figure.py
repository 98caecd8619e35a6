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
_SMALLEST, _LARGEST = 192, 320  # sides of a cell that texts fit and a screen has room for


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
    captions: Sequence[Sequence[str]] = (),
    chart: np.ndarray | None = None,
    legend: np.ndarray | None = None,
    note: str = "",
    cell: int = _CELL,
) -> Figure:
    """Lays pictures out in rows.

    Args:
      rows: of uint8 pictures `[h, w, 3]`; sizes and shapes may differ.
      title: above everything.
      columns: a caption for each picture of a row; none by default.
      labels: what each row shows, such as a file's name; "" for a row without, none by default.
      captions: for each row, a line beneath each picture; "" for a picture without.
      chart: a picture between the title and the rows, at its own size.
      legend: the same below the rows, such as `heat.scale`.
      note: below everything, wrapped.
      cell: the side, in pixels, of the square that each picture is fitted into.
    """
    across = max((len(row) for row in rows), default=0)
    widest = max(0 if each is None else each.shape[1] for each in (chart, legend))
    width = max(across * (cell + _GAP) + _GAP, 2 * _CELL, widest + 2 * _GAP)
    inner = width - 2 * _GAP
    page = _Page()
    for line in wrap(title, width=inner, size=_TITLE):
        page.put(line, _GAP, size=_TITLE, ink=INK)
        page.top += _TITLE + _GAP
    page.whole(chart)
    left = [_GAP + column * (cell + _GAP) for column in range(across)]
    page.across([wrap(each, width=cell, most=2) for each in columns], left=left, ink=INK)
    for number, row in enumerate(rows):
        for line in wrap(labels[number] if labels else "", width=inner, most=1):
            page.put(line, _GAP)
            page.top += LINE
        fitted = [_fitted(picture, cell=cell) for picture in row]
        tallest = max(each.height for each in fitted)
        for x, each in zip(left, fitted, strict=False):
            page.paste(each, x + (cell - each.width) // 2, (tallest - each.height) // 2)
        page.top += tallest + 2
        beneath = captions[number] if captions else ()
        page.across([wrap(each, width=cell, most=1) for each in beneath], left=left, ink=FAINT)
        page.top += _GAP - 2
    page.whole(legend)
    for line in wrap(note, width=inner, most=6):
        page.put(line, _GAP)
        page.top += LINE
    return _composed(page.texts, page.pictures, size=(width, page.top + _GAP))


def shown_side(size: int) -> int:
    """The cell for square pictures of so many pixels: a whole multiple where they are small."""
    return size * -(-_SMALLEST // size) if size < _SMALLEST else min(size, _LARGEST)


class _Page:
    """Texts and pictures with their places, from the top down to `top`."""

    def __init__(self) -> None:
        self.texts: list[tuple[Box, int, tuple[int, int, int]]] = []  # with their size and ink
        self.pictures: list[tuple[Box, Image.Image]] = []
        self.top = _GAP

    def put(
        self,
        text: str,
        left: int,
        *,
        down: int = 0,
        size: int = TEXT,
        ink: tuple[int, int, int] = FAINT,
    ) -> None:
        """Writes a line, `down` pixels below the top."""
        right = left + int(np.ceil(width_of(text, size=size)))
        top = self.top + down
        box = Box(left=left, top=top, right=right, bottom=top + size + 4, text=text)
        self.texts.append((box, size, ink))

    def across(
        self, texts: Sequence[Sequence[str]], *, left: Sequence[int], ink: tuple[int, int, int]
    ) -> None:
        """Writes the lines of each text from one of the `left` pixels on."""
        for x, lines in zip(left, texts, strict=False):
            for i, line in enumerate(lines):
                self.put(line, x, down=i * LINE, ink=ink)
        self.top += max((len(lines) for lines in texts), default=0) * LINE

    def paste(self, picture: Image.Image, left: int, down: int = 0) -> None:
        """Places a picture, `down` pixels below the top."""
        top = self.top + down
        box = Box(left=left, top=top, right=left + picture.width, bottom=top + picture.height)
        self.pictures.append((box, picture))

    def whole(self, picture: np.ndarray | None) -> None:
        """Places a picture at its own size in a row of its own, where there is one."""
        if picture is not None:
            self.paste(Image.fromarray(picture), _GAP)
            self.top += picture.shape[0] + _GAP


def montage(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Several figures, uint8 `[h, w, 3]`, on one sheet about as wide as it is high."""
    widest = max(each.shape[1] for each in pictures)
    area = sum(each.shape[0] for each in pictures) * widest
    across = min(len(pictures), max(1, round(area**0.5 / widest)))
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    heights = [max(each.shape[0] for each in row) for row in rows]
    sheet = np.full((sum(heights), across * widest, 3), PAPER, np.uint8)
    for top, row in zip(np.cumsum([0, *heights[:-1]]), rows, strict=True):
        for column, each in enumerate(row):
            height, width = each.shape[:2]
            sheet[top : top + height, column * widest : column * widest + width] = each
    return sheet


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
