"""No file but those of `_compat/` use a private symbol of another library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regulate
from regulate.analysis.trace import trace

PACKAGE = Path(regulate.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "_compat" not in path.parts]

# Other people's names that are used in every file: `_compat/__init__.py` says so at its top. And two of Python's.
EVERYWHERE = {"_modules", "_parameters", "_buffers", "_version", "_metadata", "_DummyThread", "_name"}
BASES = (nn.Module, torch.Tensor, torch.autograd.Function, fx.Proxy, fx.Tracer, fx.Interpreter, TorchDispatchMode)
OTHERS = {name for base in BASES for name in dir(base)}


def private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def owned(tree):
    """Private names that a file gives itself: functions, variables, attributes, imports of our own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(tree):
    """Private names that a file takes from what it did not make: attributes, imports, names in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (part for name in node.names for part in name.name.split("."))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (part for name in node.names for part in f"{node.module}.{name.name}".split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield from node.value.split(".")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_other_file_uses_a_private_symbol(path):
    tree = ast.parse(path.read_text())
    own = {name for name in owned(tree) if private(name)}
    # What bears the name of something private of a base class would replace it.
    assert own & OTHERS - EVERYWHERE == set()
    found = {name for name in used(tree) if private(name)} - own - EVERYWHERE
    assert {name for name in found if not name.startswith("_regulate_")} == set()


def test_symbols_that_are_asked_whether_they_are_parameters():
    class Asking(nn.Module):
        def forward(self, x):
            return x + 1 if isinstance(x, nn.Parameter) else x

    assert [node.op for node in trace(Asking()).graph.nodes] == ["placeholder", "output"]
