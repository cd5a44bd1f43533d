"""What can go wrong, by name. Every message says the rule, what was found and the next step."""

from __future__ import annotations


class RegulateError(Exception):
    """Base of every error that this package raises on purpose."""


class NoBlocksError(RegulateError, ValueError):
    """The model has no residual block that can carry a regulator."""


class UnsupportedModelError(RegulateError, TypeError):
    """The object cannot be rewritten: no module, scripted, not copyable, or wrapped for distributed training."""


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
