"""Compilers for the kernels that the tests write."""

from __future__ import annotations


def compiler(folder, script):
    """A compiler of one's own: a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)
