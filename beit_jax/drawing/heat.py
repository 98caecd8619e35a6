"""Maps of numbers in colours, from black over violet to pale yellow, bare or over their image."""

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.drawing.text import LINE, PAPER, width_of, write

_BAR = (224, 12)  # pixels of a scale, without its numbers
# Evenly spaced; lightness rises throughout, so that they are read in grey and by the colour-blind.
_ANCHORS = np.array(
    [(0, 0, 8), (60, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)],
    np.float64,
)


def heat(values: np.ndarray, *, largest: float | None = None) -> np.ndarray:
    """Numbers as colours.

    Args:
      values: `[h, w]`, not negative.
      largest: what the brightest colour stands for; None: the largest of these values.

    Returns:
      uint8 `[h, w, 3]`; everything is dark where no value is above 0.
    """
    top = float(values.max()) if largest is None else largest
    levels = np.clip(values / top, 0, 1) if top > 0 else np.zeros(values.shape)
    at = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(levels, at, _ANCHORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def scale(low: str, high: str) -> np.ndarray:
    """A bar with all colours of `heat`, and what its ends stand for: uint8 `[h, w, 3]`."""
    length, height = _BAR
    starts = int(np.ceil(width_of(low))) + 6
    ends = starts + length + 6
    whole = Image.new("RGB", (ends + int(np.ceil(width_of(high))) + 1, LINE), PAPER)
    draw = ImageDraw.Draw(whole)
    write(draw, (0, 1), low, width=starts)
    write(draw, (ends, 1), high, width=whole.width)
    bar = heat(np.linspace(0, 1, length)[None].repeat(height, axis=0), largest=1.0)
    whole.paste(Image.fromarray(bar), (starts, (LINE - height) // 2))
    return np.asarray(whole)


def over(image: np.ndarray, colours: np.ndarray, *, alpha: float = 0.6) -> np.ndarray:
    """Colours over the image in grey, uint8 `[h, w, 3]` both; `alpha` is the colours' share."""
    grey = image.mean(axis=-1, keepdims=True)
    return np.rint((1 - alpha) * grey + alpha * colours).astype(np.uint8)


def marked(image: np.ndarray, *, box: tuple[int, int, int, int]) -> np.ndarray:
    """The image with a frame around a box, in white within black, seen on any ground.

    Args:
      image: uint8 `[h, w, 3]`.
      box: top, left, bottom, right in pixels; the frame lies just inside.
    """
    result = image.copy()
    top, left, bottom, right = box
    for inset, ink in ((0, 0), (1, 255)):
        rows = slice(top + inset, bottom - inset)
        columns = slice(left + inset, right - inset)
        for row in (top + inset, bottom - inset - 1):
            result[row, columns] = ink
        for column in (left + inset, right - inset - 1):
            result[rows, column] = ink
    return result


def shaded(image: np.ndarray, mask: np.ndarray, *, light: float = 0.25) -> np.ndarray:
    """The image, darkened and grey where the mask, bool `[h, w]`, is false."""
    dark = np.rint(light * image.mean(axis=-1, keepdims=True)).astype(np.uint8)
    return np.where(mask[..., None], image, dark)
