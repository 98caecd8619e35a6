"""A figure: a title, rows of pictures of any shape under captions, and a note. One style for all.

    figure([[image, heat(attention, over=image)]], title="Attention", columns=["image", "head 1"])

Pictures are uint8 `[h, w, 3]`; maps are float `[h, w]`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.drawing.text import FAINT, INK, LINE, PAPER, TEXT, width_of, wrap, write

_GAP = 8
_TITLE = 18  # pixels
_CELL = 224
# Viridis (van der Walt and Smith, 2015) at ten evenly spaced places: dark to bright in lightness
# too, so that it also reads in grey and for people who see colours differently.
_VIRIDIS = (
    *((68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142)),
    *((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
)


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


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as colours: float `[h, w]` → uint8 `[h, w, 3]`. Beyond, the ends'."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    table = np.asarray(_VIRIDIS, np.float64)
    channels = [np.interp(values, places, table[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def heat(
    values: np.ndarray, *, over: np.ndarray | None = None, largest: float | None = None
) -> np.ndarray:
    """A map in colours from 0 (dark) to its largest value (bright), on its own or over an image.

    Args:
      values: float `[h, w]`, not negative.
      over: uint8 `[k h, k w, 3]` for a whole k; every value covers its k × k pixels, no others.
      largest: the value of the brightest colour; None takes the map's own.

    Returns:
      uint8, of the size of the image or of the map. Over an image, half of each.
    """
    top = float(values.max()) if largest is None else largest
    painted = colours(values / top if top > 0 else np.zeros_like(values))
    if over is None:
        return painted
    side = over.shape[0] // values.shape[0]
    painted = painted.repeat(side, axis=0).repeat(over.shape[1] // values.shape[1], axis=1)
    return np.rint(0.5 * over + 0.5 * painted).astype(np.uint8)


def outlined(image: np.ndarray, *, patch: tuple[int, int], grid: int) -> np.ndarray:
    """An image `[s, s, 3]` with a frame around one patch (row, column), white in black."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = image.shape[0] // grid
    top, left = patch[0] * side, patch[1] * side
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=(0, 0, 0))
    draw.rectangle((left, top, left + side - 1, top + side - 1), outline=(255, 255, 255))
    return np.asarray(picture)


def figure(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    title: str,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    note: str = "",
    cell: int = _CELL,
) -> np.ndarray:
    """Lays pictures out in rows.

    Args:
      rows: of uint8 pictures `[h, w, 3]`; sizes and shapes may differ.
      title: above everything.
      columns: a caption for each picture of a row; none by default.
      labels: what each row shows, such as a file's name; "" for a row without, none by default.
      note: below everything, wrapped.
      cell: the side, in pixels, of the square that each picture is fitted into.

    Returns:
      uint8 `[H, W, 3]`.
    """
    picture, _ = lay_out(rows, title=title, columns=columns, labels=labels, note=note, cell=cell)
    return picture


def lay_out(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    title: str,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    note: str = "",
    cell: int = _CELL,
) -> tuple[np.ndarray, list[Box]]:
    """`figure`, and the boxes of all its texts and pictures, none of which overlap."""
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
    whole = Image.new("RGB", (width, top + _GAP), PAPER)
    draw = ImageDraw.Draw(whole)
    for box, size, ink in placed:
        write(draw, (box.left, box.top), box.text, width=width, ink=ink, size=size)
    for box, each in pasted:
        whole.paste(each, (box.left, box.top))
    return np.asarray(whole), [*(box for box, *_ in placed), *(box for box, _ in pasted)]


def _fitted(picture: np.ndarray, *, cell: int) -> Image.Image:
    """A picture enlarged or reduced into a cell; enlarged pixels stay squares."""
    image = Image.fromarray(picture)
    factor = cell / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return image.resize(size, smooth)
