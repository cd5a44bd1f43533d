"""A trace as dataflow: which tensors every path passes, what lies before what, what a path costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import fx, nn

from .measure import Measured
from .trace import is_convolution

_ACTIVATIONS = {
    torch.relu, F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.mish, F.selu, F.celu,
    F.softplus, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
}  # fmt: skip
_NEVER = 10**6
# What takes only shape, dtype or device of a tensor: of its first argument, or of those behind that.
_LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}
_LIKE |= {torch.rand_like, torch.randn_like, torch.randint_like}
_AS = {"to", "type_as", "view_as", "expand_as", "reshape_as"}


def entering(node: fx.Node) -> fx.Node:
    """Return the tensor that enters a module call."""
    first = (*node.args, *node.kwargs.values())[0]
    assert isinstance(first, fx.Node)
    return first


def _data(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose numbers a node computes with."""
    is_method = node.op == "call_method"
    if node.target in _LIKE or (is_method and str(node.target).startswith("new_")):
        return []
    return node.all_input_nodes[: 1 if is_method and node.target in _AS else None]


class Dataflow:
    """Dominators over the nodes that carry data from the input; parameters and sizes do not count.

    Args:
        measured: what a run of a trace showed.
    """

    def __init__(self, measured: Measured) -> None:
        self.traced, self.shapes, self.changed = measured.traced, measured.shapes, measured.changed
        self.parents: dict[fx.Node, list[fx.Node]] = {}
        self.over: dict[fx.Node, fx.Node | None] = {}
        self.depth: dict[fx.Node, int] = {}
        beginning = self._beginning()
        for node in self.traced.graph.nodes:
            parents = [parent for parent in _data(node) if parent in self.depth]
            if node.op == "output" or not (parents or node in beginning) or node.name not in self.shapes:
                continue
            self.parents[node] = parents
            over = reduce(self.meet, parents) if parents else None  # type: ignore[arg-type]
            self.over[node] = over
            self.depth[node] = 0 if over is None else self.depth[over] + 1

    def _beginning(self) -> set[fx.Node]:
        """Return the inputs that blocks pass on: the first map, and others that a convolution takes by themselves.

        The time of a diffusion model or a mask is none of them.
        """
        maps = [n for n in self.traced.graph.nodes if n.op == "placeholder" and len(self.shapes.get(n.name, ())) > 2]
        behind: dict[fx.Node, set[fx.Node]] = {node: {node} for node in maps}
        found = set(maps[:1])
        for node in self.traced.graph.nodes if len(maps) > 1 else ():
            before = {at for parent in node.all_input_nodes for at in behind.get(parent, ())}
            behind.setdefault(node, before)
            if len(before) == 1 and self.is_convolution(node):
                found |= before
        return found

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape of a tensor node, None for anything else."""
        found = self.shapes.get(node.name)
        return found if isinstance(found, tuple) else None

    def is_changed(self, node: fx.Node, user: fx.Node) -> bool:
        """Check whether a tensor was changed in place between the node that made it and one that takes it."""
        return (node.name, user.name) in self.changed

    def meet(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        """Return the nearest common dominator of two nodes; a node counts as its own."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.depth[a] >= self.depth[b]:
                a = self.over[a]
            else:
                b = self.over[b]
        return a

    def chain(self, node: fx.Node | None) -> Iterator[fx.Node]:
        """Return the node and its dominators, upwards."""
        while node is not None:
            yield node
            node = self.over[node]

    def ancestors(self, node: fx.Node, stop: fx.Node) -> set[fx.Node]:
        """Return the node and everything before it, back to `stop`, which is left out."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            at = waiting.pop()
            if at is not stop and at not in seen:
                seen.add(at)
                waiting += self.parents[at]
        return seen

    def is_convolution(self, node: fx.Node) -> bool:
        """Check whether the node calls a convolution with learned weights."""
        return is_convolution(self.traced.module(node))

    def is_activation(self, node: fx.Node) -> bool:
        """Check whether the node is a nonlinearity, as a module or as a function."""
        module = self.traced.module(node)
        if module is not None:
            return type(module).__module__ == nn.ReLU.__module__
        return node.target in _ACTIVATIONS

    def enlarges(self, nodes: Sequence[fx.Node]) -> bool:
        """Check whether the grid doubles or more from one of the nodes to a later one: upsampling."""
        grids = [(self.shape(node) or ())[2:] for node in nodes]
        return any(
            len(a) == len(b) and any(y >= 2 * x for x, y in zip(a, b, strict=True))
            for a, b in itertools.combinations(grids, 2)
        )

    def cost(self, node: fx.Node) -> int:
        """Return what a shortcut pays to pass a node: 1 for a convolution, nothing for what learns no map."""
        module = self.traced.module(node)
        if is_convolution(module):
            return 1
        learns = module is not None and any(p.dim() > 1 for p in module.parameters())
        return _NEVER if learns else 0

    def cheapest(self, end: fx.Node, fork: fx.Node) -> tuple[int, list[fx.Node]]:
        """Return the cheapest path from the fork to `end`: its cost and its nodes, from `end` back."""
        best: dict[fx.Node, tuple[int, list[fx.Node]]] = {fork: (0, [])}
        way = self.ancestors(end, fork)
        for node in self.parents:
            if node in way:
                known = [best[parent] for parent in self.parents[node] if parent in best]
                least, path = min(known, key=lambda pair: pair[0])
                best[node] = (least + self.cost(node), [node, *path])
        return best[end]

    def longest(self, nodes: set[fx.Node]) -> int:
        """Return the most convolutions on one path within a set of nodes: parallel ones are no sequence."""
        passed: dict[fx.Node, int] = {}
        for node in self.parents:
            if node in nodes:
                before = [passed[parent] for parent in self.parents[node] if parent in passed]
                passed[node] = max(before, default=0) + self.is_convolution(node)
        return max(passed.values(), default=0)
