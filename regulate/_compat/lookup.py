"""Looking a private symbol of torch up."""

from __future__ import annotations

from typing import Any

import torch


def symbol(path: str) -> Any:
    """Look a symbol of torch up; None where this version has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
