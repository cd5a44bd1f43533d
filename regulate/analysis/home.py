"""Which module a residual block is, and by which paths below it its points are reached."""

from __future__ import annotations

import inspect
from collections import Counter

from torch import fx, nn

from ..utils.paths import common_prefix, is_inside, join
from .dataflow import Dataflow, entering
from .residual_blocks import Found


def home_of(flow: Dataflow, block: Found) -> str:
    """Return the innermost module that runs a block's addition and convolutions; in a graph, its convolutions."""
    if isinstance(flow.traced.root, fx.GraphModule):
        return common_prefix([str(node.target).rpartition(".")[0] for node in block.convolutions])
    home = common_prefix([node.meta["scope"] for node in (block.addition, *block.convolutions)])
    while home and home not in flow.traced.calls:
        home = home.rpartition(".")[0]
    return home


def unfit(flow: Dataflow, block: Found, root: str, home: str, residuals: int, targets: Counter[str]) -> str:
    """Say why a block cannot carry a regulator where it stands; empty if it can.

    Args:
        flow: the dataflow that it was found in.
        block: what was found.
        root: path of the module that was traced.
        home: path below that of the block's module.
        residuals: how many residual additions stand in it.
        targets: how often each module is called.
    """
    is_graph = isinstance(flow.traced.root, fx.GraphModule)
    if not home and is_graph:
        return "its convolutions have no parent module in common, whose name would be the block's"
    if not home and root:
        return "what calls it cannot be traced, and so it is not known which blocks follow each other"
    if not home:
        return "the block is not a module of its own: its addition stands in the forward of the traced network itself"
    if not inspect.isfunction(type(flow.traced.root.get_submodule(home)).forward):
        return "its class has another kind of forward than a function, which cannot be wrapped"
    if not is_graph and len(flow.traced.calls[home]) > 1:
        return "the module is called more than once, so its weights are shared between steps"
    if residuals > 1:
        return f"{residuals} residual additions stand in this one module, and a regulator needs a module of its own"
    if "forward" in vars(flow.traced.root.get_submodule(home)):
        return "its forward is replaced on the instance"
    if any(door(flow, node, home) == home for node in block.points):
        return "a convolution at its read or write point is not below the block, which only refers to it"
    if any(targets[str(node.target)] > 1 for node in block.points):
        return "a convolution at its read or write point is called more than once"
    return ""


def door(flow: Dataflow, conv: fx.Node, home: str) -> str:
    """Return the outermost module inside the block that the convolution's input enters unchanged."""
    path = str(conv.target)
    if not is_inside(path, home):
        return _alias(flow, conv, home)
    parts = path.split(".")
    for depth in range(len(home.split(".")) + 1, len(parts)):
        outer = ".".join(parts[:depth])
        calls = flow.traced.calls.get(outer, [])
        # Whoever asks for more than a map's size sees the one that came, not the fused one.
        is_asked = flow.traced.sized and type(flow.traced.root.get_submodule(outer)) is not nn.Sequential
        if not is_asked and len(calls) == 1 and calls[0] and calls[0][0] is entering(conv):
            return outer
    return path


def _alias(flow: Dataflow, conv: fx.Node, home: str) -> str:
    """Return the path inside the block of a module that the trace knows by another one; empty if it is held outside."""
    module, block = flow.traced.module(conv), flow.traced.root.get_submodule(home)
    paths = (path for path, part in block.named_modules(remove_duplicate=False) if part is module)
    return join(home, next(paths, ""))
