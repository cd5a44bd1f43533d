"""Running a script of timm with the regulated architectures registered: `regulate timm train.py ...`."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script as `python PATH ARGUMENTS` does, after `import regulate.timm`.

    Its folder comes first on `sys.path`, so that a script of a checkout runs with the checkout's timm. What the script
    raises passes through.

    Args:
        path: the script.
        arguments: of its command line.
    """
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    importlib.import_module("regulate.timm")
    runpy.run_path(path, run_name="__main__")
