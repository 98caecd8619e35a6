"""Text in pictures: one font, lines that are cut or wrapped to the width they have."""

import functools
import unicodedata

from PIL import ImageDraw, ImageFont

TEXT = 13  # pixels
LINE = 20  # height of a line
_LIKE = {"×": "x", "–": "-", "—": "-", "→": "->"}  # what the font lacks
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@functools.cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures, Pillow's own."""
    return ImageFont.load_default(size=size)


def drawable(text: str) -> str:
    """The text with what the font lacks replaced: by letters without accents, or by "?"."""
    if text.isascii():
        return text
    shown = []
    for character in unicodedata.normalize("NFC", text):
        if _lacks(character):
            base = _LIKE.get(character) or unicodedata.normalize("NFKD", character)
            character = "".join(each for each in base if not _lacks(each)) or "?"
        shown.append(character)
    return "".join(shown)


@functools.cache
def _lacks(character: str) -> bool:
    """Whether the font would draw a box in place of a character, as for one that can't exist."""
    try:
        mask, missing = (font().getmask(each) for each in (character, "\uffff"))
    except UnicodeEncodeError:  # Pillow without FreeType has a font of Latin letters
        return True
    return mask.size == missing.size and bytes(mask) == bytes(missing)


def width_of(text: str, *, size: int = TEXT) -> float:
    """The width of a line, in pixels."""
    return font(size).getlength(text)


def cut(text: str, *, width: int, size: int = TEXT) -> str:
    """The text in one line of at most so many pixels; an ellipsis says that it was longer."""
    line = " ".join(drawable(text).split())
    if width_of(line, size=size) <= width:
        return line
    while line and width_of(line + "…", size=size) > width:
        line = line[:-1]
    return line.rstrip() + "…"


def wrap(text: str, *, width: int, size: int = TEXT, most: int = 3) -> list[str]:
    """The text in lines of at most so many pixels; what doesn't fit `most` lines is cut."""
    lines: list[str] = []
    line = ""
    words = drawable(text).split()
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
