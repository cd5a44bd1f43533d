"""Python in a process of its own, for what happens once a process."""

from __future__ import annotations

import os
import subprocess
import sys


def command(code: str) -> list[str]:
    """A command that runs some code and shows every warning."""
    return [sys.executable, "-W", "always", "-c", code]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some code to its end."""
    everything = {**os.environ, **environment}
    return subprocess.run(command(code), env=everything, capture_output=True, text=True, timeout=300)
