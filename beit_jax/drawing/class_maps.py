"""Class maps for people to look at: in colours, over their image, side by side with a legend.

    paint(classes)                                   # uint8 [h, w] → uint8 [h, w, 3]
    overlay(image, classes)
    sheet({"image": images, "label": labels, "prediction": predictions}, names=("sky", "road"))

A class has the same colour in every picture, however many classes there are.
"""

import functools
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.config.segment import IGNORE
from beit_jax.drawing.text import FAINT, LINE, PAPER, cut, width_of, write
from beit_jax.files import write_whole

_IGNORED_COLOR = (128, 128, 128)
_FIRST_COLOR = (45, 90, 150)  # class 0 often is the background, which should look like one
# A picture is fitted into a square as large as the largest of them, within these bounds.
_SMALLEST_CELL, _LARGEST_CELL = 192, 320
_GAP = 6
_SWATCH = 14
_LONGEST_NAME = 190  # pixels of a class name in the legend; a longer one is cut


@functools.cache
def palette() -> np.ndarray:
    """The colour of every class, far from one another: uint8 `[256, 3]`; ignored (255) is grey.

    Each but the first is the colour farthest in CIELAB, where distances are what people see, from
    grey and from all before it; the first classes are thus the easiest to tell apart.
    """
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _cielab(grid)
    # Neither black nor white nor greyish: shadows, paper and what is ignored look like that. Nor
    # neon: a street that takes half of the picture would outshine the rest.
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 25) & (lab[:, 0] < 90) & (chroma > 20) & (chroma < 72)
    grid, lab = grid[usable], lab[usable]
    grey, first = _cielab(np.asarray([_IGNORED_COLOR, _FIRST_COLOR]))
    nearest = np.linalg.norm(lab - grey, axis=1)
    chosen = np.linalg.norm(lab - first, axis=1).argmin()
    colors = np.empty((256, 3), np.uint8)
    colors[IGNORE] = _IGNORED_COLOR
    for i in range(IGNORE):
        colors[i] = grid[chosen]
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen], axis=1))
        chosen = nearest.argmax()
    return colors


def _cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB levels `[n, 3]` → CIELAB `[n, 3]` (IEC 61966-2-1; CIE 15, white D65)."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.asarray(to_xyz).T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def paint(classes: np.ndarray) -> np.ndarray:
    """A class map in colours: uint8 `[h, w]` → uint8 `[h, w, 3]`."""
    return palette()[classes]


def overlay(image: np.ndarray, classes: np.ndarray, *, alpha: float = 0.5) -> np.ndarray:
    """An image under the colours of its classes; ignored pixels show the image alone.

    Args:
      image: uint8 `[h, w, 3]`.
      classes: uint8 `[h, w]`.
      alpha: the colours' share, 0..1.
    """
    mixed = (1 - alpha) * image + alpha * paint(classes)
    return np.where((classes == IGNORE)[..., None], image, np.rint(mixed).astype(np.uint8))


def save_class_map(path: str, classes: np.ndarray) -> None:
    """Writes a class map uint8 `[h, w]` as a PNG with a palette, whose values are the classes.

    `path` is local or gs://; the file is written whole or not at all.
    """
    picture = Image.fromarray(classes, mode="P")
    picture.putpalette(palette().tobytes())
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_whole(path, content.getvalue())


def sheet(
    columns: Mapping[str, Sequence[np.ndarray]],
    *,
    names: Sequence[str],
    titles: Sequence[str] = (),
) -> np.ndarray:
    """Pictures and class maps side by side, under captions, over a legend of what occurs.

    Args:
      columns: by caption, as many each as there are rows: images uint8 `[h, w, 3]`, shown as they
        are, or class maps uint8 `[h, w]`, painted. Sizes and shapes may differ from row to row.
      names: of the classes.
      titles: what each row shows, such as a file's name; none by default.

    Returns:
      uint8 `[H, W, 3]`.
    """
    largest = max(max(each.shape[:2]) for column in columns.values() for each in column)
    cell = min(max(largest, _SMALLEST_CELL), _LARGEST_CELL)
    rows = [
        [_fitted(picture, cell=cell) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    present = sorted({int(c) for each in columns.values() for c in _classes(each)})
    width = max(len(columns) * (cell + _GAP) + _GAP, _LONGEST_NAME + 2 * _SWATCH)
    title = LINE if titles else 0
    heights = [max(picture.height for picture in row) for row in rows]
    legend = _legend(present, names=names, width=width)
    height = LINE + sum(each + title + _GAP for each in heights) + legend.height
    whole = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(whole)
    left = [_GAP + i * (cell + _GAP) for i in range(len(columns))]
    for x, caption in zip(left, columns, strict=True):
        write(draw, (x, 2), caption, width=cell)
    top = LINE
    for i, (row, tallest) in enumerate(zip(rows, heights, strict=True)):
        if titles:
            write(draw, (_GAP, top + 2), titles[i], width=width - 2 * _GAP, ink=FAINT)
        top += title
        for x, picture in zip(left, row, strict=True):
            # In the middle of its cell.
            at = (x + (cell - picture.width) // 2, top + (tallest - picture.height) // 2)
            whole.paste(picture, at)
        top += tallest + _GAP
    whole.paste(legend, (0, top))
    return np.asarray(whole)


def _classes(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The classes that occur in the class maps among these."""
    maps = [np.unique(each) for each in pictures if each.ndim == 2]
    return np.unique(np.concatenate(maps)) if maps else np.empty(0, int)


def _fitted(picture: np.ndarray, *, cell: int) -> Image.Image:
    """A picture, or a painted class map, enlarged or reduced into a cell."""
    is_map = picture.ndim == 2
    image = Image.fromarray(paint(picture) if is_map else picture)
    factor = cell / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # Classes must not be mixed, and pixels that are enlarged may be seen as such.
    smooth = factor < 1 and not is_map
    return image.resize(size, Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)


def _legend(present: Sequence[int], *, names: Sequence[str], width: int) -> Image.Image:
    """Swatches with class names, in as many columns as the width has room for."""
    texts = [cut(_name(c, names), width=_LONGEST_NAME) for c in present]
    longest = max([width_of(text) for text in texts], default=0)
    column = int(longest) + _SWATCH + 4 * _GAP
    across = max(1, (width - _GAP) // column)
    legend = Image.new("RGB", (width, -(-len(texts) // across) * LINE + _GAP), PAPER)
    draw = ImageDraw.Draw(legend)
    for i, (c, text) in enumerate(zip(present, texts, strict=True)):
        x, y = _GAP + i % across * column, i // across * LINE
        red, green, blue = (int(level) for level in palette()[c])
        box = (x, y + 3, x + _SWATCH, y + 3 + _SWATCH)
        draw.rectangle(box, fill=(red, green, blue), outline=FAINT)
        write(draw, (x + _SWATCH + _GAP, y + 2), text, width=_LONGEST_NAME)
    return legend


def _name(c: int, names: Sequence[str]) -> str:
    if c == IGNORE:
        return "ignored"
    return names[c] if c < len(names) else f"class {c}"
