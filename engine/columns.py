"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def columns(rows: Sequence[Sequence[str]], left: set[int]) -> Iterator[str]:
    """Return the lines of a table.

    Args:
        rows: Cells, the heads first; each row has equally many.
        left: Numbers of the columns that are aligned to the left; -1 is the last one.
    """
    last = len(rows[0]) - 1
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i in left or (i == last and -1 in left) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
