"""Public names that have moved or gone: they still import, with a DeprecationWarning."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "regulate.bench": "regulate.tools.bench",
    "regulate.cells": "regulate.nn.cells",
    "regulate.figures": "regulate.tools.figures",
    "regulate.training.freezing": "regulate.rewrite.freezing",  # stands in pickles of frozen networks
    "regulate.verify": "regulate.testing",
    "regulate.watch": "regulate.training.gradients",
}


class _Moved(MetaPathFinder, Loader):
    """Finds the old names, and fills their modules with the attributes of those of the new names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} has moved to {new}; the old name will go in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        # Not a copy of the names: an attribute that is set there later must be seen here.
        vars(module)["__getattr__"] = partial(getattr, import_module(new))


def optimize_for_inference(model: Any) -> Any:
    """Return a copy in eval mode and without gradients, which is as fast as the copy with folded norms was."""
    warnings.warn(
        "optimize_for_inference brought no speed and only copies now; call model.eval(). It will go in version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return copy.deepcopy(model).eval().requires_grad_(False)


def moved(name: str) -> Any:
    """Return a name that the package had: a module to be imported by its old name, or a function that is gone."""
    if name == "optimize_for_inference":
        return optimize_for_inference
    if f"regulate.{name}" in MOVED:
        return import_module(f"regulate.{name}")
    raise AttributeError(f"module 'regulate' has no attribute {name!r}")


sys.meta_path.append(_Moved())
