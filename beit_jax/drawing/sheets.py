"""Pictures for people to look at: what a tokenizer keeps, and what a model fills in."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.files import write_whole

_GAP = 4
_CAPTION = 14
_MIN_SIDE = 96  # smaller images are enlarged to at least this many pixels, without smoothing


def contact_sheet(rows: list[list[np.ndarray]], *, captions: list[str]) -> np.ndarray:
    """Puts images of equal size into a captioned grid.

    Args:
      rows: each a list of uint8 `[s, s, 3]`, one per caption.
      captions: what each column shows.

    Returns:
      uint8 `[h, w, 3]`.
    """
    side = rows[0][0].shape[0]
    scale = max(1, -(-_MIN_SIDE // side))
    cell = side * scale
    width = len(captions) * (cell + _GAP) + _GAP
    height = _CAPTION + len(rows) * (cell + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((_GAP + column * (cell + _GAP), 1), caption, fill="black")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (_GAP + c * (cell + _GAP), _CAPTION + _GAP + r * (cell + _GAP)))
    return np.asarray(sheet)


def columns_sheet(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """`contact_sheet` with a column per entry: caption → uint8 `[rows, s, s, 3]`."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return contact_sheet(rows, captions=list(columns))


def hide_patches(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greys out masked patches.

    Args:
      images: uint8 `[b, s, s, 3]`.
      mask: bool `[b, grid, grid]`.
    """
    side = images.shape[1] // mask.shape[1]
    hidden = mask.astype(bool).repeat(side, axis=1).repeat(side, axis=2)[..., None]
    return np.where(hidden, np.uint8(128), images)


def to_uint8(images: np.ndarray, *, side: int | None = None) -> np.ndarray:
    """Float images in [0, 1] `[b, s, s, 3]` → uint8, resized to `side` where it is given."""
    images = np.clip(np.asarray(images) * 255 + 0.5, 0, 255).astype(np.uint8)
    if side is None or side == images.shape[1]:
        return images
    resize = [Image.fromarray(image).resize((side, side)) for image in images]
    return np.stack([np.asarray(image) for image in resize])


def save_png(path: str, image: np.ndarray) -> None:
    """Writes uint8 `[h, w, 3]`, local or gs://, whole or not at all."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    write_whole(path, content.getvalue())
