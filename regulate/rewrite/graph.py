"""A plan spliced into a `torch.fx.GraphModule`, whose blocks are nodes and not modules.

A graph has no blocks to call, so here the recurrence is written into it: per block a call of the cell, a call
of the fusion, and the state that travels on as a value.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from ..schema.plan import Stage
from ..utils.classes import Forward, Part, become, leave
from ..utils.paths import join
from .alignment import aligned
from .carrier import Chain
from .disable import is_off
from .lookup import CHAIN, GRAPH, Record


class Switched(Part):
    """A fusion that is called by a graph: it asks itself whether it is switched off."""

    def _regulate_run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a fusion, or hand its input through while its chain is switched off."""
        chain: Chain | None = self.__dict__.get(CHAIN)
        return args if chain is not None and is_off(chain) else forward(self, *args, **kwargs)


def install_in_graph(model: fx.GraphModule, record: Record, fusions: Mapping[str, nn.Module], undo: ExitStack) -> None:
    """Regulate the stages of a graph. In place; each edit is entered in `undo` before it is made.

    Args:
        model: the graph's module.
        record: what is done, in paths relative to the graph's module.
        fusions: the new modules, by path of their block.
        undo: takes what reverses each edit.
    """
    before, edited = model.graph, copy.deepcopy(model.graph)
    undo.callback(_give_back, model, before, record)
    for stage, chain in zip(record.stages, record.chains, strict=True):
        for block in stage.blocks:
            fusion = fusions[block.name]
            model.get_submodule(block.name)._modules["regulator"] = fusion
            vars(fusion)[CHAIN], vars(fusion)[GRAPH] = chain, record
            become(fusion, Switched)
        _splice(edited, stage)
    model.graph = edited
    model.graph.lint()


def uninstall_from_graph(model: fx.GraphModule, record: Record) -> None:
    """Take the regulators out of a graph; what was done to the graph since stays. In place."""
    graph = model.graph
    fused = {join(block.name, "regulator") for stage in record.stages for block in stage.blocks}
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target in fused]:
        for user in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]:
            user.replace_all_uses_with(_entering(node))
    added = fused | {join(path, "cell") for path in fused}
    for node in reversed(list(graph.nodes)):
        if not node.users and (str(node.target) in added or "regulate" in node.meta or _reads(node, added)):
            graph.erase_node(node)
    _give_back(model, graph, record)


def _reads(node: fx.Node, added: set[str]) -> bool:
    """Check whether a node takes a part of what a regulator put out."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and str(node.args[0].target) in added


def _give_back(model: fx.GraphModule, graph: fx.Graph, record: Record) -> None:
    """Set the graph and take the modules out."""
    paths = {join(block.name, "regulator") for stage in record.stages for block in stage.blocks}
    for path, fusion in [(path, module) for path, module in model.named_modules() if path in paths]:
        del model.get_submodule(path.rpartition(".")[0])._modules["regulator"]
        vars(fusion).pop(CHAIN, None)
        leave(fusion, Switched)
    model.graph = graph


def _splice(graph: fx.Graph, stage: Stage) -> None:
    """Add a stage's recurrence to a graph: per block cell, fusion, and the state that travels on."""
    calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    cell = f"{stage.blocks[0].name}.regulator.cell"
    tracer = _Marking(graph)
    state: fx.Node | None = None
    for block in stage.blocks:
        write = calls[block.write]
        x = _entering(write)
        with graph.inserting_before(write):
            read = fx.Proxy(_entering(calls[block.read]), tracer)
            read = aligned(read, fx.Proxy(x, tracer), block.stride, block.crop)
            step = graph.call_module(cell, (read.node, state))
            both = graph.call_module(f"{block.name}.regulator", (x, step))
            fused = graph.call_function(operator.getitem, (both, 0))
            state = graph.call_function(operator.getitem, (both, 1))
        write.replace_input_with(x, fused)


def _entering(point: fx.Node) -> fx.Node:
    """Return the map that enters a convolution."""
    return point.all_input_nodes[0]


class _Marking(GraphAppendingTracer):
    """Writes what is computed with its proxies into a graph, and marks it as ours."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As the class's own."""
        node = super().create_node(*args, **kwargs)
        node.meta["regulate"] = True
        return node
