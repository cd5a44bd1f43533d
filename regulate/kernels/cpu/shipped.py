"""The libraries that a wheel brings: which of them this processor runs."""

from __future__ import annotations

import platform
from pathlib import Path

from .build import TARGETS, told_of_processor

FOLDER = Path(__file__).parent / "compiled"


def libraries() -> list[Path]:
    """Return the libraries of this installation that fit the processor, the fastest first; none outside of wheels."""
    known = features()
    fitting = [target for target in TARGETS.get(platform.machine().lower(), ()) if set(target.needs.split()) <= known]
    return [path for target in fitting if (path := FOLDER / target.file).is_file()]


def features() -> set[str]:
    """Return the processor's features, by the names that Linux has for them; empty where it does not say."""
    cores = [set(listed.split()) for listed in told_of_processor("flags", "features")]
    return set.intersection(*cores) if cores else set()
