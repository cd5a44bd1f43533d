"""Errors that a user can do something about, as one line."""

from __future__ import annotations

from safetensors import SafetensorError

import regulate

# What scripts report in one line; anything else is a fault of ours, and shows where.
EXPECTED = (regulate.RegulateError, SafetensorError, ValueError, RuntimeError, OSError)


def one_line(error: BaseException) -> str:
    """Return what an error says, else its kind. Of one that a loader's process raised, what that process said."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught ") and "DataLoader" in lines[0]:
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return " ".join(" ".join(lines).split()) or type(error).__name__
