"""torch.fx traces: what runs after what, how large, and inside which module.

Tracing runs a module's code, so it is done on skeletons only (`skeleton.py`).

Which modules are opened? Only such as hold a convolution. Norms, activations, dropout, DropPath,
pools and the like hold none and stay closed, so their `self.training` branches are never frozen and
their odd code is never seen. A module that holds convolutions but cannot be traced is closed as well
and remembered, and its children are traced on their own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from .errors import first_line

Shapes = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of an opened module: its arguments and result in terms of the graph's nodes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Trace:
    """A module's dataflow.

    Args:
        root: the traced module (of a skeleton).
        graph: its torch.fx graph; closed modules are `call_module` nodes.
        calls: for each opened module, by path, its calls.
        closed: modules that hold convolutions but could not be opened, with the reason.
    """

    root: nn.Module
    graph: fx.Graph
    calls: dict[str, list[Call]] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a `call_module` node calls, else None."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_convolution(module: nn.Module | None) -> bool:
    """Whether the module is a convolution with learned weights (transposed ones included)."""
    return isinstance(module, _ConvNd)


def holds_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution below the module. A convolution itself does not count."""
    return not is_convolution(module) and any(is_convolution(child) for child in module.modules())


class _Proxy(fx.Proxy):
    """Leaves `x += y` in place, as it was written; fx would make it an addition that allocates its result."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Opens what `opens` says; each node remembers in `meta["scope"]` the opened module it ran in."""

    def __init__(self, opens: Callable[[nn.Module, str], bool], method: str, exits: bool) -> None:
        super().__init__()
        self.opens, self.traced_func_name, self.exits = opens, method, exits
        self.stack = [""]
        self.calls: dict[str, list[Call]] = {}
        self.closed: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack[-1]
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.opens(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        before = len(self.graph.nodes)
        self.stack.append(path)
        try:
            result = forward(*args, **kwargs)
        except Exception as error:
            # What cannot be opened stays closed: unwind its half-made nodes and call it as a whole.
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.closed[path] = first_line(error)
            self.calls = {name: made for name, made in self.calls.items() if not _inside(name, path)}
            self.stack.pop()
            return self.create_proxy("call_module", path, args, kwargs)
        self.stack.pop()
        made = Call(*_nodes((args, kwargs, result)))
        self.calls.setdefault(path, []).append(made)
        return self._exit(path, args, kwargs, result) if self.exits else result

    def _exit(self, path: str, args: Any, kwargs: Any, result: Any) -> Any:
        """Calls the opened module with its true input and its finished result, so that its hooks see both."""
        passed = self.create_proxy("call_module", path, (*args, result), kwargs)
        if isinstance(result, tuple | list):
            return type(result)(passed[i] for i in range(len(result)))  # type: ignore[index]
        return passed


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _nodes(value: Any) -> Any:
    return fx.node.map_aggregate(value, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)


def trace(
    module: nn.Module,
    opens: Callable[[nn.Module, str], bool] | None = None,
    *,
    method: str = "forward",
    fixed: Mapping[str, Any] | None = None,
    exits: bool = False,
) -> Trace:
    """Traces one method of a module.

    Args:
        module: what to trace; a skeleton or a part of one, since tracing runs the module's code.
        opens: `(module, path) -> bool`, which submodules to look into; by default those that hold a
            convolution.
        method: the method to trace.
        fixed: arguments that are constants, by name; by default those with a default value.
        exits: ends each opened module with a call of itself on its arguments and its result.

    Raises:
        Exception: whatever the module's own code raises when it is run symbolically.
    """
    tracer = _Tracer(opens or (lambda m, _: holds_convolution(m)), method, exits)
    known = constants(module, method) if fixed is None else dict(fixed)
    graph = tracer.trace(module, concrete_args=known)
    for node in graph.find_nodes(op="placeholder"):
        # torch.fx renames the arguments that it was given as constants; callers may use their names.
        if str(node.target).removesuffix("_1") in known:
            node.target = str(node.target).removesuffix("_1")
    return Trace(module, graph, tracer.calls, tracer.closed)


def constants(module: nn.Module, method: str, call: Call | None = None) -> dict[str, Any]:
    """The arguments of a method that are constants in a call, or in one without optional arguments.

    Args:
        module: whose method it is.
        method: its name.
        call: how it is called; None leaves optional arguments at their defaults.
    """
    signature = inspect.signature(getattr(module, method))
    if call is None:
        values = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    else:
        bound = signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        values = bound.arguments
    return {
        name: value for name, value in values.items() if value is None or isinstance(value, bool | int | float | str)
    }


def traces(model: nn.Module) -> Iterator[tuple[str, Trace | str]]:
    """Traces the model or, where it or a part cannot be traced, the children of that part.

    Args:
        model: a skeleton.

    Yields:
        `(path, trace)`, or `(path, reason)` for a module that cannot be traced as a whole.
    """
    waiting = [""]
    while waiting:
        path = waiting.pop(0)
        module = model.get_submodule(path)
        try:
            made = trace(module)
        except Exception as error:
            if type(module).forward is not nn.Module.forward:  # a ModuleList has none to trace
                yield path, first_line(error)
            stuck = [path]
        else:
            yield path, made
            stuck = [join(path, closed) for closed in made.closed]
        waiting += [
            join(parent, name)
            for parent in stuck
            for name, child in model.get_submodule(parent).named_children()
            if holds_convolution(child)
        ]


def join(root: str, path: str) -> str:
    """A path below a root, either of which may be empty."""
    return f"{root}.{path}" if root and path else root or path


class _Measure(fx.Interpreter):
    """Runs a trace and notes each node's shape: a tuple, `"tuple"` or None."""

    def __init__(self, traced: Trace) -> None:
        super().__init__(fx.GraphModule(traced.root, traced.graph))
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.shapes[n.name] = "tuple"
        return value


def measure(traced: Trace, shape: tuple[int, ...]) -> Shapes:
    """Runs the trace on the meta device: no arithmetic, shapes only.

    Args:
        traced: a trace of a skeleton.
        shape: the input's, (N, C, H, W).

    Returns:
        For each node that holds a tensor its shape, for a tuple of tensors `"tuple"`, by node name.

    Raises:
        Exception: whatever the model raises on an input of this size.
    """
    dtype = next((p.dtype for p in traced.root.parameters() if p.is_floating_point()), torch.float32)
    runner = _Measure(traced)
    with torch.no_grad(), torch.device("meta"):
        runner.run(torch.empty(shape, dtype=dtype, device="meta"))
    return runner.shapes
