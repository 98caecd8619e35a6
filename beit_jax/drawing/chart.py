"""A small chart in the style of the figures: one falling curve on a logarithmic scale."""

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.drawing.text import FAINT, INK, LINE, PAPER, TEXT, width_of, write

_CURVE, _GRID = (140, 41, 129), (225, 225, 225)
_HEIGHT = 200  # pixels of the axes
_LEFT, _RIGHT = 64, 8


def falling(
    values: np.ndarray, *, width: int, level: float, level_name: str, x_name: str, y_name: str
) -> np.ndarray:
    """Draws values from the largest down, on a logarithmic scale of shares.

    Args:
      values: `[n]`, above 0 and at most 1, in any order; at least one.
      width: of the chart, in pixels.
      level: a value to compare with, drawn as a line across.
      level_name: what that is.
      x_name: what is counted from left to right.
      y_name: what the values are.

    Returns:
      uint8 `[h, width, 3]`.
    """
    ordered = np.sort(np.asarray(values, np.float64))[::-1]
    low = np.floor(np.log10(min(ordered[-1], level)))
    high = np.ceil(np.log10(max(ordered[0], level)))
    high = max(high, low + 1)
    right = width - _RIGHT
    top, bottom = LINE + 4, LINE + 4 + _HEIGHT
    whole = Image.new("RGB", (width, bottom + LINE + 4), PAPER)
    draw = ImageDraw.Draw(whole)

    def down(value: float) -> int:
        return round(top + (high - np.log10(value)) / (high - low) * _HEIGHT)

    write(draw, (0, 0), y_name, width=width)
    for power in range(int(low), int(high) + 1):
        y = down(10.0**power)
        draw.line([(_LEFT, y), (right, y)], fill=_GRID)
        text = f"{100 * 10.0**power:g} %"
        at = (_LEFT - 6 - int(width_of(text)), y - TEXT // 2 - 2)
        write(draw, at, text, width=_LEFT, ink=FAINT)
    y = down(level)
    for x in range(_LEFT, right, 8):
        draw.line([(x, y), (min(x + 4, right), y)], fill=FAINT)
    write(
        draw, (right - int(width_of(level_name)) - 2, y - LINE), level_name, width=width, ink=FAINT
    )
    # Codes are counted from 1; each is a step, so that a few of them look like a few.
    edges = np.linspace(_LEFT, right, len(ordered) + 1)
    points = [
        (x, down(value))
        for start, end, value in zip(edges[:-1], edges[1:], ordered, strict=True)
        for x in (start, end)
    ]
    draw.line(points, fill=_CURVE, width=2)
    draw.line([(_LEFT, top), (_LEFT, bottom), (right, bottom)], fill=INK)
    write(draw, (_LEFT, bottom + 3), "1", width=width, ink=FAINT)
    last = f"{len(ordered):,}"
    write(draw, (right - int(width_of(last)) - 1, bottom + 3), last, width=width, ink=FAINT)
    middle = (_LEFT + right - int(width_of(x_name))) // 2
    write(draw, (middle, bottom + 3), x_name, width=width)
    return np.asarray(whole)
