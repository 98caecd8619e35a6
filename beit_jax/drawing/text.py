"""Text in pictures: one font, lines that are cut or wrapped to the width they have."""

import functools

from PIL import ImageDraw, ImageFont

TEXT = 13  # pixels
LINE = 20  # height of a line
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@functools.cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures, Pillow's own."""
    return ImageFont.load_default(size=size)


def width_of(text: str, *, size: int = TEXT) -> float:
    """The width of a line, in pixels."""
    return font(size).getlength(text)


def cut(text: str, *, width: int, size: int = TEXT) -> str:
    """The text in one line of at most so many pixels; an ellipsis says that it was longer."""
    line = " ".join(text.split())
    if width_of(line, size=size) <= width:
        return line
    while line and width_of(line + "…", size=size) > width:
        line = line[:-1]
    return line.rstrip() + "…"


def wrap(text: str, *, width: int, size: int = TEXT, most: int = 3) -> list[str]:
    """The text in lines of at most so many pixels; what doesn't fit `most` lines is cut."""
    lines: list[str] = []
    line = ""
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{line} {word}" if line else word
        if not line or width_of(longer, size=size) <= width:
            line = longer
            continue
        if len(lines) == most - 1:
            line = " ".join([line, *words[i:]])
            break
        lines.append(line)
        line = word
    return [cut(each, width=width, size=size) for each in [*lines, line] if each]


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    *,
    width: int,
    ink: tuple[int, int, int] = INK,
    size: int = TEXT,
) -> None:
    """Writes one line, cut to a width in pixels."""
    draw.text(at, cut(text, width=width, size=size), fill=ink, font=font(size))
