"""The libraries that a wheel brings: which of them this processor runs."""

from __future__ import annotations

import platform
from pathlib import Path

from .build import TARGETS

FOLDER = Path(__file__).parent / "compiled"


def libraries() -> list[Path]:
    """Return the libraries of this installation that fit the processor, the fastest first; none outside of wheels."""
    if not FOLDER.is_dir():
        return []
    known = features()
    fitting = [target for target in TARGETS.get(platform.machine().lower(), ()) if set(target.needs.split()) <= known]
    return [path for target in fitting if (path := FOLDER / target.file).is_file()]


def features() -> set[str]:
    """Return the processor's features, by the names that Linux has for them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, listed = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return set(listed.split())
    return set()
