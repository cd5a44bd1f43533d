"""torch.fx traces: what runs after what, and inside which module.

Tracing runs a module's code, so it is done on skeletons only (`meta_copy.py`).

Which modules are opened? Only such as hold a convolution. Norms, activations, dropout, DropPath,
pools and the like hold none and stay closed, so their `self.training` branches are never frozen and
their odd code is never seen. A module that holds convolutions but cannot be traced is closed as well
and remembered, and its children are traced on their own.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from .._compat.modules import Convolution, NoParameter
from ..schema.text import located
from ..utils.modes import fixed_random_state
from ..utils.paths import is_inside, join
from .effects import put_back
from .inputs import Inputs, guessed


@dataclass(frozen=True)
class Trace:
    """A module's dataflow.

    Args:
        root: the traced module (of a skeleton).
        graph: its torch.fx graph; closed modules are `call_module` nodes.
        inputs: the call that was traced.
        calls: for each opened module, by path, the positional arguments of its calls in terms of the graph's nodes.
        closed: modules that hold convolutions but could not be opened, with the reason.
    """

    root: nn.Module
    graph: fx.Graph
    inputs: Inputs
    calls: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a `call_module` node calls, else None."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_convolution(module: nn.Module | None) -> bool:
    """Check whether the module is a convolution with learned weights (transposed ones included)."""
    return isinstance(module, Convolution)


def holds_convolution(module: nn.Module) -> bool:
    """Check whether there is a convolution below the module. A convolution itself does not count."""
    return not is_convolution(module) and any(is_convolution(child) for child in module.modules())


# What an assignment to changes a tensor; anything else is a mark of the user's on it.
_TENSOR_STATE = {"data", "grad", "requires_grad"}


class _Proxy(NoParameter, fx.Proxy):
    """A symbol that passes for a tensor where code asks, and records what is done in place as such."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _TENSOR_STATE:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            super().__setattr__(name, value)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch.fx would make an addition that allocates its result of `x += y`.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    """Opens what holds a convolution; each node remembers in `meta["scope"]` the opened module it ran in."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs, self.thread = inputs, threading.get_ident()
        self.path = ""
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        self.closed: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # Before torch.fx asks whether it is a tensor.
        return a.node if type(a) is _Proxy else super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
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
        if threading.get_ident() != self.thread:  # torch.fx has exchanged `nn.Module.__call__` for all threads
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not holds_convolution(m):
            return self.create_proxy("call_module", path, args, kwargs)
        before = len(self.graph.nodes)
        outer, self.path = self.path, path
        try:
            result = forward(*args, **kwargs)
            nodes: Any = fx.node.map_aggregate(args, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)
            self.calls.setdefault(path, []).append(nodes)
            return result
        except Exception as error:
            # What cannot be opened stays closed: unwind its half-made nodes and call it as a whole.
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.closed[path] = located(error)
            self.calls = {name: made for name, made in self.calls.items() if not is_inside(name, path)}
        finally:
            self.path = outer
        return self.create_proxy("call_module", path, args, kwargs)


@contextmanager
def _symbols_are_tensors() -> Iterator[None]:
    """Let `isinstance(x, Tensor)` and `torch.is_tensor(x)` hold for symbols, so that code takes a tensor's way.

    Only where Python code asks. A symbol whose `__class__` says so would be unpacked as a tensor by torch's C code,
    where it stands for a size, and that kills the process.
    """
    original = builtins.isinstance

    def asked(value: Any, kind: Any) -> bool:
        if type(value) is _Proxy and (kind is Tensor or (type(kind) is tuple and Tensor in kind)):
            return True
        return original(value, kind)

    builtins.isinstance = asked  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = original


def trace(module: nn.Module, inputs: Inputs | None = None) -> Trace:
    """Trace a module's forward.

    Args:
        module: what to trace; a skeleton or a part of one, since tracing runs the module's code.
        inputs: the call to trace: its tensors are symbols, everything else is a constant. By default the first
            argument is a symbol and optional ones have their defaults.

    Raises:
        Exception: whatever the module's own code raises when it is run symbolically.
    """
    inputs = inputs or guessed(module)
    tracer = _Tracer(inputs)
    with fixed_random_state(), put_back(module), _symbols_are_tensors():
        graph = tracer.trace(module)
    return Trace(module, graph, inputs, tracer.calls, tracer.closed)


def traces(model: nn.Module, known: Mapping[str, Inputs]) -> Iterator[tuple[str, Trace | str]]:
    """Trace the model or, where it or a part cannot be traced, the children of that part.

    Args:
        model: a skeleton.
        known: what its modules are called with, by path, as far as it is known.

    Yields:
        `(path, trace)`, or `(path, reason)` for a module that cannot be traced as a whole.
    """
    waiting = [""]
    for path in waiting:  # which grows meanwhile
        module = model.get_submodule(path)
        try:
            made = trace(module, known.get(path))
        except Exception as error:
            if type(module).forward is not nn.Module.forward:  # a ModuleList has none to trace
                yield path, located(error)
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
