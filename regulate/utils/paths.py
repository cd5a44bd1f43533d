"""Paths of modules, as `nn.Module.get_submodule` takes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def module_at(module: nn.Module | None, path: str) -> nn.Module | None:
    """Return a module below another one, None where there is none: `get_submodule` raises, and asks `__getattr__`."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def join(root: str, path: str) -> str:
    """Return a path below a root, either of which may be empty."""
    return f"{root}.{path}" if root and path else root or path


def relative(path: str, root: str) -> str:
    """Return the part of a path that lies below a root."""
    return path[len(root) :].lstrip(".")


def is_inside(path: str, root: str) -> bool:
    """Check whether a path is a root or lies below it."""
    return not root or path == root or path.startswith(f"{root}.")


def common_prefix(paths: Sequence[str]) -> str:
    """Return the longest path that all paths lie below."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return ".".join(names[0] for names in shared)
