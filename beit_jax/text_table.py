"""Text tables: aligned columns for reports on a terminal."""

from collections.abc import Sequence


def text_table(
    rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), align: str = "", gap: str = "  "
) -> str:
    """Aligns cells in columns.

    Args:
      rows: cells, every row of the same length.
      header: cells of the first line, underlined; empty for none.
      align: one letter per column, "l" or "r"; columns without one are aligned left.
      gap: what separates columns.

    Returns:
      Lines joined by newlines, without trailing spaces.

    Raises:
      ValueError: rows of different lengths.
    """
    lines = [*([header] if header else []), *rows]
    if len({len(line) for line in lines}) > 1:
        raise ValueError(f"rows of different lengths: {sorted({len(line) for line in lines})}")
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = align.ljust(len(widths), "l")

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(cells, widths, sides, strict=True)
        )
        return gap.join(padded).rstrip()

    text = [line(cells) for cells in lines]
    if header:
        text.insert(1, "-" * (sum(widths) + len(gap) * (len(widths) - 1)))
    return "\n".join(text)
