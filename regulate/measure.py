"""Running a skeleton and its trace on the meta device: shapes, operators and what passes the points.

A trace is one symbolic run of the network's Python. Where that run took another way than a real one takes,
the trace describes another network. So both are run here, without arithmetic, and their operators compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._compat import SEES_OPERATORS, DispatchMode, flops, tree_leaves
from .inputs import Inputs
from .modes import fixed_random_state
from .paths import is_inside
from .trace import Trace

Shapes = dict[str, Any]

# A constant tensor of the code is made once in a trace and anew in each run.
_CONSTANTS = {"aten.detach.default", "aten.lift_fresh.default", "aten.detach_.default"}


@dataclass(frozen=True)
class Measured:
    """What one run of a trace showed.

    Args:
        shapes: for each node that holds a tensor its shape, for a tuple of tensors `"tuple"`, by node name.
        changed: pairs of nodes, by name: the first one's tensor was changed before the second one took it.
        operators: closed modules and operators between them, with shapes, by the opened module they ran in.
        flops: floating-point operations of convolutions and matrix products; None where torch does not tell.
    """

    shapes: Shapes
    changed: frozenset[tuple[str, str]] = frozenset()
    operators: dict[str, list[str]] = field(default_factory=dict)
    flops: int | None = None


@dataclass(frozen=True)
class Observed:
    """What one run of a skeleton's own code showed.

    Args:
        operators: as in `Measured`.
        passes: for each watched module the maps that entered it, as (order, shape), by path.
    """

    operators: dict[str, list[str]]
    passes: dict[str, list[tuple[int, tuple[int, ...]]]]


def agree(a: Measured | Observed, b: Measured | Observed, path: str) -> bool:
    """Check whether the same ran in a module, and in those below it, in two runs. No, where that cannot be seen."""
    scopes = {scope for scope in (*a.operators, *b.operators) if is_inside(scope, path)}
    return SEES_OPERATORS and all(a.operators.get(scope) == b.operators.get(scope) for scope in scopes)


class _Log(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes by scope which closed modules are called and which operators run between them; counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scope, self.quiet = "", False
        self.operators: dict[str, list[str]] = {}
        self.flops: int | None = 0 if SEES_OPERATORS else None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flops(function, args, kwargs or {}, result)
        self.flops = None if self.flops is None or count is None else self.flops + count
        if not self.quiet and str(function) not in _CONSTANTS:
            self.note(str(function), result)
        return result

    def note(self, what: str, tensors: Any) -> None:
        """Enter something with the shapes of its tensors."""
        self.operators.setdefault(self.scope, []).append(f"{what}{_shapes(tensors)}")


class _Interpreter(fx.Interpreter):
    """Runs a trace and notes each node's shape, and tensors that changed between their node and its user."""

    def __init__(self, traced: Trace, log: _Log) -> None:
        super().__init__(traced.root, graph=traced.graph)  # type: ignore[arg-type]
        self.log = log
        self.shapes: Shapes = {}
        self.changed: set[tuple[str, str]] = set()
        self.versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.log.scope = n.meta.get("scope", "")
        for before in n.all_input_nodes:
            if before in self.versions and self.env[before]._version != self.versions[before]:
                self.changed.add((before.name, n.name))
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name], self.versions[n] = tuple(value.shape), value._version
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.shapes[n.name] = "tuple"
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # A constant tensor of the code is a real one in the trace.
        return value.to("meta") if isinstance(value, Tensor) and value.dim() else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.log.note(target, (args, kwargs))
        self.log.quiet = True
        try:
            return super().call_module(target, args, kwargs)
        finally:
            self.log.quiet = False


def measure(traced: Trace, inputs: Inputs) -> Measured:
    """Run a trace on the meta device: no arithmetic, shapes only.

    Args:
        traced: a trace of a skeleton.
        inputs: of the form that it was traced with.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    log = _Log()
    runner = _Interpreter(traced, log)
    with torch.device("meta"), fixed_random_state(), log:
        runner.run(*inputs.tensors)
    return Measured(runner.shapes, frozenset(runner.changed), log.operators, log.flops)


def observe(traced: Trace, inputs: Inputs, measured: Measured, points: Sequence[str]) -> Observed:
    """Run the traced module's own code on the meta device; closed modules put out what they did in the trace.

    Args:
        traced: a trace of a skeleton.
        inputs: of the form that it was traced with.
        measured: a run of the trace on them.
        points: paths of the modules to watch.

    Raises:
        Exception: whatever the code raises.
    """
    try:
        # Numbers that are drawn and read at once must be real ones.
        return _observed(traced, inputs, measured, points, nullcontext())
    except Exception:
        return _observed(traced, inputs, measured, points, torch.device("meta"))


def _observed(
    traced: Trace,
    inputs: Inputs,
    measured: Measured,
    points: Sequence[str],
    device: AbstractContextManager[Any],
) -> Observed:
    log = _Log()
    passes: dict[str, list[tuple[int, tuple[int, ...]]]] = {path: [] for path in points}
    closed: dict[str, list[Any]] = {}
    for node in traced.graph.find_nodes(op="call_module"):
        closed.setdefault(str(node.target), []).append(measured.shapes.get(node.name))
    with ExitStack() as stack:
        for path in traced.calls:
            module = traced.root.get_submodule(path)
            stack.enter_context(_replaced(module, _scoped(module, path, log)))
        for path, shapes in closed.items():
            module = traced.root.get_submodule(path)
            stack.enter_context(_replaced(module, _played(module.forward, path, shapes, log)))
        for path in points:
            module = traced.root.get_submodule(path)
            stack.enter_context(_replaced(module, _watched(module.forward, path, passes)))
        for context in (device, fixed_random_state(), log):
            stack.enter_context(context)
        traced.root(*inputs.args, **inputs.kwargs)
    return Observed(log.operators, passes)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one object another forward for the body."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _scoped(module: nn.Module, path: str, log: _Log) -> Callable[..., Any]:
    """An opened module's forward, in whose scope operators are noted."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        outer, log.scope = log.scope, path
        try:
            return forward(*args, **kwargs)
        finally:
            log.scope = outer

    return run


def _played(forward: Callable[..., Any], path: str, shapes: list[Any], log: _Log) -> Callable[..., Any]:
    """A closed module's forward that puts out a map of the shape that it had in the trace, call by call."""
    waiting = list(shapes)

    def run(*args: Any, **kwargs: Any) -> Any:
        log.note(path, (args, kwargs))
        shape = waiting.pop(0) if waiting else None
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        log.quiet = True
        try:
            return x.new_empty(shape) if x is not None and isinstance(shape, tuple) else forward(*args, **kwargs)
        finally:
            log.quiet = False

    return run


def _watched(forward: Callable[..., Any], path: str, passes: dict[str, list[Any]]) -> Callable[..., Any]:
    """A module's forward that notes what enters it, and in which order."""

    def run(*args: Any, **kwargs: Any) -> Any:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        passes[path].append((sum(map(len, passes.values())), () if x is None else tuple(x.shape)))
        return forward(*args, **kwargs)

    return run


def _shapes(tensors: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
