"""Residual blocks in a dataflow graph, by dominators. No class names, no attribute names.

A *residual block* is an addition of two maps of one shape whose operands part at a tensor, their nearest
common dominator, the *fork*. One way from the fork, the shortcut, learns next to nothing; the other, the
branch, holds two convolutions or more in a row. A *trunk convolution* is one that every path of the branch passes:
it dominates the branch's end. The memory is read where the second trunk convolution is entered and fused
in where the last one is entered.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from .measure import Measured
from .trace import Trace, is_convolution

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS = {
    torch.relu, F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.mish, F.selu, F.celu,
    F.softplus, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
}  # fmt: skip
_NEVER = 10**6


@dataclass(frozen=True)
class Found:
    """One residual addition and what was seen of its block.

    Args:
        addition: the node that adds shortcut and branch.
        before: the nearest residual addition upstream, along the shortcut, if any.
        convolutions: every convolution of the branch, in order.
        trunk: those that every path passes.
        read: the convolution whose input feeds the memory.
        write: the convolution whose input the memory is fused into.
        reason: why the block cannot carry a regulator; empty if it can.
    """

    addition: fx.Node
    before: fx.Node | None
    convolutions: tuple[fx.Node, ...]
    trunk: tuple[fx.Node, ...]
    read: fx.Node | None = None
    write: fx.Node | None = None
    reason: str = ""


def entering(node: fx.Node) -> fx.Node:
    """The tensor that enters a module call."""
    first = (*node.args, *node.kwargs.values())[0]
    assert isinstance(first, fx.Node)
    return first


class Dataflow:
    """Dominators over the nodes that carry data from the input; parameters and sizes do not count.

    Args:
        traced: a trace.
        measured: what a run of it showed.
    """

    def __init__(self, traced: Trace, measured: Measured) -> None:
        self.traced, self.shapes, self.changed = traced, measured.shapes, measured.changed
        shapes = self.shapes
        self.parents: dict[fx.Node, list[fx.Node]] = {}
        self.over: dict[fx.Node, fx.Node | None] = {}
        self.depth: dict[fx.Node, int] = {}
        beginning = self._beginning()
        for node in traced.graph.nodes:
            parents = [parent for parent in node.all_input_nodes if parent in self.depth]
            begins = node in beginning
            if node.op == "output" or not (parents or begins) or node.name not in shapes:
                continue
            self.parents[node] = parents
            over: fx.Node | None = parents[0] if parents else None
            for parent in parents[1:]:
                over = self.meet(over, parent)
            self.over[node] = over
            self.depth[node] = 0 if over is None else self.depth[over] + 1

    def _beginning(self) -> set[fx.Node]:
        """The inputs that blocks pass on: the first map, and others that a convolution takes by themselves.

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
        """The shape of a tensor node, None for anything else."""
        found = self.shapes.get(node.name)
        return found if isinstance(found, tuple) else None

    def is_changed(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a tensor was changed in place between the node that made it and one that takes it."""
        return (node.name, user.name) in self.changed

    def meet(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        """The nearest common dominator of two nodes; a node counts as its own."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.depth[a] >= self.depth[b]:
                a = self.over[a]
            else:
                b = self.over[b]
        return a

    def chain(self, node: fx.Node | None) -> Iterator[fx.Node]:
        """The node and its dominators, upwards."""
        while node is not None:
            yield node
            node = self.over[node]

    def ancestors(self, node: fx.Node, stop: fx.Node) -> set[fx.Node]:
        """The node and everything before it, back to `stop`, which is left out."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            at = waiting.pop()
            if at is not stop and at not in seen:
                seen.add(at)
                waiting += self.parents[at]
        return seen

    def is_convolution(self, node: fx.Node) -> bool:
        """Whether the node calls a convolution with learned weights."""
        return is_convolution(self.traced.module(node))

    def is_activation(self, node: fx.Node) -> bool:
        """Whether the node is a nonlinearity, as a module or as a function."""
        module = self.traced.module(node)
        if module is not None:
            return type(module).__module__ == nn.ReLU.__module__
        return node.target in _ACTIVATIONS

    def enlarges(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether the grid doubles or more from one of the nodes to a later one: upsampling."""
        grids = [(self.shape(node) or ())[2:] for node in nodes]
        return any(
            len(a) == len(b) and any(y >= 2 * x for x, y in zip(a, b, strict=True))
            for at, a in enumerate(grids)
            for b in grids[at + 1 :]
        )

    def cost(self, node: fx.Node) -> int:
        """What a shortcut pays to pass a node: 1 for a convolution, nothing for what learns no map."""
        module = self.traced.module(node)
        if is_convolution(module):
            return 1
        learns = module is not None and any(p.dim() > 1 for p in module.parameters())
        return _NEVER if learns else 0

    def cheapest(self, end: fx.Node, fork: fx.Node) -> tuple[int, list[fx.Node]]:
        """The cheapest path from the fork to `end`: its cost and its nodes, from `end` back."""
        best: dict[fx.Node, tuple[int, fx.Node | None]] = {fork: (0, None)}
        way = self.ancestors(end, fork)
        for node in self.parents:
            if node in way:
                known = [(best[parent][0], parent) for parent in self.parents[node] if parent in best]
                least, parent = min(known, key=lambda pair: pair[0])
                best[node] = (least + self.cost(node), parent)
        path: list[fx.Node] = []
        at: fx.Node | None = end
        while at is not None and at is not fork:
            path.append(at)
            at = best[at][1]
        return best[end][0], path

    def longest(self, nodes: set[fx.Node]) -> int:
        """The most convolutions on one path within a set of nodes: parallel ones are no sequence."""
        passed: dict[fx.Node, int] = {}
        for node in self.parents:
            if node in nodes:
                before = [passed[parent] for parent in self.parents[node] if parent in passed]
                passed[node] = max(before, default=0) + self.is_convolution(node)
        return max(passed.values(), default=0)


def find(flow: Dataflow) -> list[Found]:
    """All residual blocks of a trace, in forward order.

    Args:
        flow: the trace's dataflow.

    Returns:
        The blocks; those that cannot carry a regulator with the reason.
    """
    found: dict[fx.Node, Found] = {}
    for node in list(flow.parents):
        if node.target in _ADDITIONS and node.op in ("call_function", "call_method"):
            block = _block(flow, node, found)
            if block is not None:
                found[node] = block
    return list(found.values())


def _block(flow: Dataflow, addition: fx.Node, found: dict[fx.Node, Found]) -> Found | None:
    operands = addition.args[:2]
    a, b = operands if len(operands) == 2 else (None, None)
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and a in flow.parents and b in flow.parents):
        return None
    if flow.shape(a) is None or flow.shape(a) != flow.shape(b) or len(flow.shape(a) or ()) < 3:
        return None
    fork = flow.over[addition]
    if fork is None or flow.shape(fork) is None:
        return None
    ways = [way for way in (_way(flow, fork, a, b), _way(flow, fork, b, a)) if way]
    if not ways:
        return None
    way = min(ways, key=lambda way: way.cost)
    trunk = tuple(node for node in flow.chain(way.end) if node in way.branch and flow.is_convolution(node))[::-1]
    if flow.enlarges((fork, *trunk, addition)) or not _outweighs(trunk, way.branch, found):
        return None
    upstream = next((node for node in (*way.shortcut, *_lineage(flow, fork)) if node in found), None)
    if upstream is not None and _something_between(flow, upstream, addition, found):
        upstream = None
    convolutions = tuple(node for node in flow.parents if node in way.branch and flow.is_convolution(node))
    return _points(flow, Found(addition, upstream, convolutions, trunk))


@dataclass(frozen=True)
class _Way:
    """One reading of an addition: the shortcut's cost and path, the branch's nodes and end."""

    cost: int
    shortcut: list[fx.Node]
    branch: set[fx.Node]
    end: fx.Node


def _way(flow: Dataflow, fork: fx.Node, shortcut: fx.Node, end: fx.Node) -> _Way | None:
    cost, path = flow.cheapest(shortcut, fork)
    if cost > 2 or (cost == 2 and any(flow.is_activation(node) for node in path)):
        return None
    # In a dual path network the fork lies blocks above, where the dense path began: what the
    # shortcut itself has passed is not this block's branch.
    branch = flow.ancestors(end, fork) - flow.ancestors(shortcut, fork)
    # Where the two paths travel apart from each other, they meet again at the block's entry, beside the shortcut.
    meeting = [node for node in flow.chain(end) if node in branch and shortcut in flow.parents[node]]
    if meeting and shortcut is not fork:
        branch = flow.ancestors(end, meeting[-1])
    return _Way(cost, path, branch, end) if flow.longest(branch) >= 2 else None


def _lineage(flow: Dataflow, fork: fx.Node) -> Iterator[fx.Node]:
    """The dominators of a fork, upwards; where one is a concatenation, what its parts went through as well.

    The addition of a dual path block does not dominate the next block, because the dense path goes around
    it, but its result is a part of the concatenation that does.
    """
    for node in flow.chain(fork):
        yield node
        if node.target in (torch.cat, torch.concat):
            parts = {above for part in flow.parents[node] for above in flow.chain(part)}
            parts -= set(flow.chain(flow.over[node]))
            yield from (above for above in reversed(flow.parents) if above in parts)


def _something_between(flow: Dataflow, first: fx.Node, last: fx.Node, found: dict[fx.Node, Found]) -> bool:
    """Whether another residual block lies between two: in parallel branches that meet again before the second."""
    between = [node for node in flow.ancestors(last, first) if node in found]
    return any(first in flow.parents[at] for node in between for at in flow.ancestors(node, first))


def _outweighs(trunk: Sequence[fx.Node], branch: set[fx.Node], found: dict[fx.Node, Found]) -> bool:
    """Settles nesting. Of nested candidates the inner ones win, as the backbone's blocks do over an FPN's
    lateral addition; but a single one in a branch with two trunk convolutions of its own is a part of that
    branch, such as a non-local attention with a shortcut, and is struck from the list.
    """
    inner = [node for node in found if node in branch]
    if not inner:
        return True
    own = [node for node in trunk if node not in found[inner[0]].convolutions]
    if len(inner) > 1 or len(own) < 2:
        return False
    del found[inner[0]]
    return True


def _takes_map_first(flow: Dataflow, conv: fx.Node) -> bool:
    """Whether the first argument of a convolution's call is its map: a class of the user's own may take others."""
    first = next(iter((*conv.args, *conv.kwargs.values())), None)
    shape = flow.shape(first) if isinstance(first, fx.Node) else None
    return shape is not None and len(shape) > 2


def _points(flow: Dataflow, block: Found) -> Found:
    trunk = block.trunk
    if not all(_takes_map_first(flow, conv) for conv in trunk):
        return replace(block, reason="a convolution in it is not called with its map first")
    if len(trunk) >= 2:
        read, write = trunk[1], trunk[-1]
    elif len(trunk) == 1 and set(block.convolutions) & flow.ancestors(entering(trunk[0]), trunk[0]):
        read = write = trunk[0]
    else:
        return replace(block, reason="there is no convolution that every path of the branch passes after another one")
    return replace(block, read=read, write=write)
