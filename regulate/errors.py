"""What can go wrong, by name. Every message says the rule, what was found and the next step."""

from __future__ import annotations

import traceback
from pathlib import Path


class RegulateError(Exception):
    """Base of every error that this package raises on purpose."""


class NoBlocksError(RegulateError, ValueError):
    """The model has no residual block that can carry a regulator."""


class UnsupportedModelError(RegulateError, TypeError):
    """The object is not a model that can be rewritten: wrapped, compiled, already a graph, no module."""


class AlreadyRegulatedError(RegulateError, ValueError):
    """The model carries regulators already."""


class NotRegulatedError(RegulateError, ValueError):
    """The model carries no regulators."""


class UnknownStageError(RegulateError, ValueError):
    """A stage was asked for that the model does not have."""


class BlockCallError(RegulateError, RuntimeError):
    """A regulated block was called without the blocks that feed its memory, or in a way that would lose it."""


class CalibrationError(RegulateError, ValueError):
    """`calibrate` was called on a network that is trained already, or without usable data."""


class CheckpointError(RegulateError, ValueError):
    """A checkpoint is damaged, foreign, of a newer format, or does not fit the model."""


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
    own = str(Path(__file__).parent)
    passed = traceback.extract_tb(error.__traceback__)
    frames = [
        frame
        for frame in passed
        if not frame.filename.startswith((own, "<")) and "torch" not in Path(frame.filename).parts
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if any(Path(frame.filename).parts[-3:] == ("torch", "utils", "checkpoint.py") for frame in passed):
        return f"a symbol cannot be checkpointed{place}; switch its gradient checkpointing off, and on again afterwards"
    return first_line(error) + place
