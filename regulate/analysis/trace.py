"""torch.fx traces: what runs after what, and inside which module.

Tracing runs a module's code, so it is done on skeletons only (`meta_copy.py`).

Which modules are opened? Only such as hold a convolution. Norms, activations, dropout, DropPath,
pools and the like hold none and stay closed, so their `self.training` branches are never frozen and
their odd code is never seen. A module that holds convolutions but cannot be traced is closed as well
and remembered, and its children are traced on their own.

A symbol stands for anything at first. Where code asks it for a number, as `assert x.size(1) == n` does,
a second trace knows the inputs' shapes, and only tensors are symbols in it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .._compat.modules import Convolution
from ..schema.text import located
from ..utils.modes import fixed_random_state
from ..utils.paths import is_inside, join
from .effects import put_back
from .inputs import Inputs, guessed
from .symbols import PLAIN, Runner, Symbol, symbols_are_tensors


@dataclass(frozen=True)
class Trace:
    """A module's dataflow.

    Args:
        root: the traced module (of a skeleton).
        graph: its torch.fx graph; closed modules are `call_module` nodes.
        inputs: the call that was traced.
        calls: for each opened module, by path, the positional arguments of its calls in terms of the graph's nodes.
        closed: modules that hold convolutions but could not be opened, with the reason.
        sized: whether sizes, types and numbers of tensors are those of the inputs: the trace is of no other ones.
    """

    root: nn.Module
    graph: fx.Graph
    inputs: Inputs
    calls: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    sized: bool = False

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a `call_module` node calls, else None."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_convolution(module: nn.Module | None) -> bool:
    """Check whether the module is a convolution with learned weights (transposed ones included)."""
    return isinstance(module, Convolution)


def holds_convolution(module: nn.Module) -> bool:
    """Check whether there is a convolution below the module. A convolution itself does not count."""
    return not is_convolution(module) and any(is_convolution(child) for child in module.modules())


class _Tracer(fx.Tracer):
    """Opens what holds a convolution; each node remembers in `meta["scope"]` the opened module it ran in."""

    def __init__(self, inputs: Inputs, sized: bool) -> None:
        super().__init__()
        self.inputs, self.sized, self.thread = inputs, sized, threading.get_ident()
        self.values: dict[fx.Node, Any] = {}
        self.rebound: list[tuple[fx.Proxy, fx.Node]] = []
        self.is_running = False
        self.path = ""
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        self.closed: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Symbol(node, self)

    def known(self, symbol: fx.Proxy) -> Any:
        """Return what a symbol stands for in a sized trace, on the meta device."""
        self.is_running = True
        try:
            with torch.device("meta"):
                for node in (*symbol.node.all_input_nodes, symbol.node):  # the code's constants as well
                    self.values[node] = self.values[node] if node in self.values else self.runner.run_node(node)
        finally:
            self.is_running = False
        return self.values[symbol.node]

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        symbol: Any = super().create_proxy(*args, **kwargs)
        if not self.sized:
            return symbol
        try:
            known = self.known(symbol)
        except Exception:
            self.graph.erase_node(symbol.node)  # for code that catches it
            raise
        if type(known) in (tuple, list):
            return type(known)(symbol[at] for at in range(len(known)))
        return known if known is None or isinstance(known, PLAIN) else symbol

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: Any) -> Any:
        return (obj[at] for at in range(len(obj))) if self.sized else super().iter(obj)

    def create_arg(self, a: Any) -> Any:
        # Before torch.fx asks whether it is a tensor.
        return a.node if type(a) is Symbol else super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        self.runner = Runner(self.root, garbage_collect_values=False, graph=self.graph)
        self.runner.env, self.runner.args_iter = self.values, iter(self.inputs.tensors)
        # A placeholder for each tensor of the call that is traced; everything else is the value that it is there.
        call = self.inputs.replaced(lambda at, _: self.create_proxy("placeholder", f"input_{at}", (), {}))

        def run(root: Any) -> None:
            # What it returns may be an object that no graph can hold, and is not needed.
            if inspect.isgenerator(root_fn(root, *call.args, **call.kwargs)):
                raise TypeError("its forward is a generator, whose code runs outside of the call")

        return run, [self.root]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.path
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # torch.fx has exchanged `nn.Module.__call__`, for all threads.
        if self.is_running or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if type(m) is nn.Sequential and m not in (self.submodule_paths or ()):  # a slice of one
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not holds_convolution(m):
            return self.create_proxy("call_module", path, args, kwargs)
        before, rebound = len(self.graph.nodes), len(self.rebound)
        outer, self.path = self.path, path
        try:
            result = forward(*args, **kwargs)
            nodes: Any = fx.node.map_aggregate(args, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)
            self.calls.setdefault(path, []).append(nodes)
            return result
        except Exception as error:
            # What cannot be opened stays closed: unwind its half-made nodes and call it as a whole.
            for symbol, was in reversed(self.rebound[rebound:]):
                symbol.node = was
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.closed[path] = located(error)
            self.calls = {name: made for name, made in self.calls.items() if not is_inside(name, path)}
        finally:
            self.path = outer
        return self.create_proxy("call_module", path, args, kwargs)


def trace(module: nn.Module, inputs: Inputs | None = None, sized: bool = False) -> Trace:
    """Trace a module's forward.

    Args:
        module: what to trace; a skeleton or a part of one, since tracing runs the module's code.
        inputs: the call to trace: its tensors are symbols, everything else is a constant. By default the first
            argument is a symbol and optional ones have their defaults.
        sized: whether sizes, types and numbers of tensors are constants as well.

    Raises:
        Exception: whatever the module's own code raises when it is run symbolically.
    """
    tracer = _Tracer(inputs or guessed(module), sized)
    with fixed_random_state(), put_back(module), symbols_are_tensors():
        graph = tracer.trace(module)
    return Trace(module, graph, tracer.inputs, tracer.calls, tracer.closed, sized)


def traces(
    model: nn.Module, known: Mapping[str, Inputs], images: Callable[[nn.Module], Iterable[Inputs]]
) -> Iterator[tuple[str, Trace | str]]:
    """Trace the model or, where it or a part cannot be traced, the children of that part.

    Args:
        model: a skeleton.
        known: what its modules are called with, by path, as far as it is known.
        images: inputs to try for a module of which that is not known.

    Yields:
        `(path, trace)`, or `(path, reason)` for a module that cannot be traced as a whole.
    """
    waiting = [""]
    for path in waiting:  # which grows meanwhile
        module, stuck = model.get_submodule(path), [path]
        if type(module).forward is not nn.Module.forward:  # a ModuleList has none to trace
            made = _opened(module, known.get(path), images)
            yield path, made
            stuck = [join(path, closed) for closed in made.closed] if isinstance(made, Trace) else stuck
        waiting += [
            join(parent, name)
            for parent in stuck
            for name, child in model.get_submodule(parent).named_children()
            if holds_convolution(child)
        ]


def _opened(module: nn.Module, known: Inputs | None, images: Callable[[nn.Module], Iterable[Inputs]]) -> Trace | str:
    """Return a trace in which as much as possible is open, else why there is none."""
    made, failure = _tried(module, known), ""
    if isinstance(made, Trace) and not made.closed:
        return made
    for inputs in images(module) if known is None else [known]:
        with torch.no_grad():
            sized = _tried(module, inputs, sized=True)
        if isinstance(sized, Trace):
            if isinstance(made, str) or len(sized.calls) > len(made.calls):
                return sized
            made.closed.update({path: why for path, why in sized.closed.items() if path in made.closed})
            return made
        if not failure and sized != made:
            advice = "" if known or "meta" in sized else "; give input_size= or example_inputs="
            failure = f"; on an image of {'x'.join(map(str, inputs.image[1:]))}: {sized}{advice}"
    return f"{made}{failure}" if isinstance(made, str) else made


def _tried(module: nn.Module, inputs: Inputs | None, sized: bool = False) -> Trace | str:
    try:
        return trace(module, inputs, sized)
    except Exception as error:
        return located(error)
