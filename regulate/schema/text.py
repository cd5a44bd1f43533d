"""Tables that a person can read."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns of text left-aligned, of numbers right-aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, strict=True)
        cells = [cell.rjust(width) if cell[:1] in "0123456789+-" else cell.ljust(width) for cell, width in pairs]
        return "  ".join(cells).rstrip()

    return [line(head), *(line(row) for row in rows)]
