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
from dataclasses import dataclass

import torch
from torch import fx

from .dataflow import Dataflow, entering
from .symbols import assigned

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Found:
    """One residual addition and what was seen of its block.

    Args:
        addition: the node that adds shortcut and branch.
        before: the nearest residual addition upstream, along the shortcut, if any.
        convolutions: every convolution of the branch, in order.
        points: the convolution whose input feeds the memory, and the one whose input it is fused into; none if the
            block cannot carry a regulator.
        reason: why the block cannot carry a regulator; empty if it can.
    """

    addition: fx.Node
    before: fx.Node | None
    convolutions: tuple[fx.Node, ...]
    points: tuple[fx.Node, ...]
    reason: str


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
    operands = (*addition.args[:2], *(addition.kwargs[key] for key in ("input", "other") if key in addition.kwargs))
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
    return Found(addition, upstream, convolutions, *_points(flow, trunk, convolutions))


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
    """Return the dominators of a fork, upwards; where one is put together of parts, what these went through as well.

    The addition of a dual path block does not dominate the next block, because the dense path goes around
    it, but its result is a part of the concatenation that does. An assignment to some channels puts together, too.
    """
    for node in flow.chain(fork):
        yield node
        if node.target in (torch.cat, torch.concat, assigned):
            parts = {above for part in flow.parents[node] for above in flow.chain(part)}
            parts -= set(flow.chain(flow.over[node]))
            yield from (above for above in reversed(flow.parents) if above in parts)


def _something_between(flow: Dataflow, first: fx.Node, last: fx.Node, found: dict[fx.Node, Found]) -> bool:
    """Check whether another residual block lies between two: in parallel branches that meet again before the second."""
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
    """Check whether the first argument of a convolution's call is its map; a user's class may take others."""
    first = next(iter((*conv.args, *conv.kwargs.values())), None)
    shape = flow.shape(first) if isinstance(first, fx.Node) else None
    return shape is not None and len(shape) > 2


def _points(
    flow: Dataflow, trunk: Sequence[fx.Node], convolutions: Sequence[fx.Node]
) -> tuple[tuple[fx.Node, ...], str]:
    """Return `points` and `reason` of a block; trunk convolutions are those that every path of its branch passes."""
    if not all(_takes_map_first(flow, conv) for conv in trunk):
        return (), "a convolution in it is not called with its map first"
    if len(trunk) >= 2:
        return (trunk[1], trunk[-1]), ""
    if trunk and set(convolutions) & flow.ancestors(entering(trunk[0]), trunk[0]):
        return (trunk[0], trunk[0]), ""
    return (), "there is no convolution that every path of the branch passes after another one"
