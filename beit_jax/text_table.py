"""Text tables: aligned columns for reports on a terminal."""

from collections.abc import Sequence


def text_table(
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = (),
    align: str = "",
    gap: str = "  ",
    gaps: Sequence[str] = (),
    widths: Sequence[int] = (),
) -> str:
    """Aligns cells in columns.

    Args:
      rows: cells, every row of the same length.
      header: cells of the first line, underlined; empty for none.
      align: one letter per column, "l" or "r"; columns without one are aligned left.
      gap: separator between columns.
      gaps: separators after the first columns, where they differ from `gap`.
      widths: fixed widths of the first columns, so that several tables are aligned with each other;
        a longer cell shifts the rest of its line. Other columns are as wide as their longest cell.

    Returns:
      Lines joined by newlines, without trailing spaces.

    Raises:
      ValueError: rows of different lengths.
    """
    lines = [*([header] if header else []), *rows]
    if len({len(line) for line in lines}) > 1:
        raise ValueError(f"rows of different lengths: {sorted({len(line) for line in lines})}")
    columns = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    columns[: len(widths)] = widths
    sides = align.ljust(len(columns), "l")
    after = [*gaps, *[gap] * (len(columns) - 1 - len(gaps)), ""]

    def line(cells: Sequence[str]) -> str:
        padded = (
            (cell.rjust(width) if side == "r" else cell.ljust(width)) + separator
            for cell, width, side, separator in zip(cells, columns, sides, after, strict=True)
        )
        return "".join(padded).rstrip()

    text = [line(cells) for cells in lines]
    if header:
        text.insert(1, "-" * (sum(columns) + sum(len(separator) for separator in after)))
    return "\n".join(text)
