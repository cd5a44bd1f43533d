"""Save and load regulated networks."""

from .hub import from_pretrained, save_pretrained
from .save_load import load, save

__all__ = ["from_pretrained", "load", "save", "save_pretrained"]
