"""Paths of modules, as `nn.Module.get_submodule` takes them."""

from __future__ import annotations

from collections.abc import Sequence


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
    common = paths[0].split(".") if paths[0] else []
    for path in paths[1:]:
        parts = path.split(".")
        agree = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), len(parts))
        common = common[:agree]
    return ".".join(common)
