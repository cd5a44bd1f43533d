"""Text for people: tables, and an error in one line."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns of text left-aligned, of numbers right-aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, strict=True)
        cells = [cell.rjust(width) if cell[:1] in "0123456789+-" else cell.ljust(width) for cell, width in pairs]
        return "  ".join(cells).rstrip()

    return [line(head), *(line(row) for row in rows)]


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, where torch's lists of errors say what happened."""
    return ([type(error).__name__, *str(error).strip().splitlines()])[-1].strip()


def first_line(error: Exception) -> str:
    """Return the first sentence of an error's message, for a reason in a plan."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # The message of a KeyError is the key alone.
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) else line.split(". ")[0]


def located(error: Exception) -> str:
    """Return the first sentence of an error's message, and where it was raised outside of torch and this package."""
    own = str(Path(__file__).parents[1])
    passed = traceback.extract_tb(error.__traceback__)
    frames = [f for f in passed if not f.filename.startswith((own, "<")) and "torch" not in Path(f.filename).parts]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return first_line(error) + place
