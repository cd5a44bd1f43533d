"""Running a skeleton and its trace on the meta device: shapes, operators and what passes the points.

A trace is one symbolic run of the network's Python. Where that run took another way than a real one takes,
the trace describes another network. So both are run here, without arithmetic, and their operators compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._compat.operators import SEES_OPERATORS, DispatchMode, flops, is_pure, storage_of, tree_leaves, tree_map, written
from ..utils.modes import fixed_random_state
from ..utils.paths import is_inside
from .effects import put_back
from .inputs import Inputs
from .symbols import Runner
from .trace import Trace

Shapes = dict[str, Any]

# A constant tensor of the code is made once in a trace and anew in each run.
_CONSTANTS = {"aten.detach.default", "aten.lift_fresh.default", "aten.detach_.default"}
# Norms put out a map like the one that enters, and take most of a run's time on the meta device.
_SLOW = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# On a storage: how often its tensors were written to.
_WRITES = "_regulate_writes"
# On a storage: in which run a tensor of it was last made from inputs, weights or random draws.
_REACHED = "_regulate_reached"


@dataclass(frozen=True)
class Measured:
    """What one run of a trace showed.

    Args:
        traced: the trace.
        inputs: what it ran on.
        shapes: for each node that holds a tensor its shape, for a tuple of tensors `"tuple"`, by node name.
        changed: pairs of nodes, by name: the first one's tensor was changed before the second one took it.
        operators: closed modules and operators between them, with shapes, by the opened module they ran in; without
            those that make the code's constants, which a trace runs once and its graph not at all.
        flops: floating-point operations of convolutions and matrix products; None where torch does not tell.
    """

    traced: Trace
    inputs: Inputs
    shapes: Shapes
    changed: frozenset[tuple[str, str]]
    operators: dict[str, list[str]]
    flops: int | None


@dataclass(frozen=True)
class Observed:
    """What one run of a skeleton's own code showed.

    Args:
        operators: as in `Measured`.
        constants: those that make the code's constants, and what these hold where a map is computed with them.
        passes: for each watched module the maps that entered it, as (order, shape), by path.
    """

    operators: dict[str, list[str]]
    constants: dict[str, list[str]]
    passes: dict[str, list[tuple[int, tuple[int, ...]]]]


def agree(a: Measured | Observed, b: Measured | Observed, path: str) -> bool:
    """Check whether the same ran in a module, and in those below it, in two runs. No, where that cannot be seen."""
    scopes = {scope for scope in (*a.operators, *b.operators) if is_inside(scope, path)}
    return SEES_OPERATORS and all(a.operators.get(scope) == b.operators.get(scope) for scope in scopes)


class Log(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes by scope which closed modules are called and which operators run between them; counts operations.

    Args:
        root: what is going to run; an operator on its parameters or buffers is noted.
        inputs: what it runs on.
    """

    def __init__(self, root: nn.Module, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scope, self.quiet = "", False
        self.run = object()
        for tensor in (*inputs.tensors, *root.parameters(), *root.buffers()):
            self._reach(tensor)
        self.operators: dict[str, list[str]] = {}
        self.constants: dict[str, list[str]] = {}
        self.flops: int | None = 0 if SEES_OPERATORS else None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        overwritten = {id(tensor) for tensor in written(function, args)}  # which may never have been filled
        held = self._held([one for one in (*args, *kwargs.values()) if id(one) not in overwritten])
        try:
            result = function(*args, **kwargs)
        except RuntimeError:
            # A constant tensor of the code's, as a mean to subtract, is a real one.
            args, kwargs = tree_map(_weightless, (args, kwargs))
            result = function(*args, **kwargs)
        count = flops(function, args, kwargs, result)
        self.flops = None if self.flops is None or count is None else self.flops + count
        made, changed = _tensors(result), written(function, args)
        is_constant = self._is_constant(function, (*args, *kwargs.values()), made)
        for tensor in () if is_constant else (*made, *changed):
            self._reach(tensor)
        if not self.quiet and str(function) not in _CONSTANTS:
            numbers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, int | float)]
            self.note(str(function), made, numbers, self.constants if is_constant else None)
            if held and not is_constant:
                self.note(str(function), (), held, self.constants)
        for tensor in changed:
            # On the storage: what was got by .data has a version of its own.
            storage = tensor.untyped_storage()
            setattr(storage, _WRITES, getattr(storage, _WRITES, 0) + 1)
        return result

    def _reach(self, tensor: Tensor) -> None:
        if (storage := storage_of(tensor)) is not None:
            setattr(storage, _REACHED, self.run)

    def _is_reached(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor)
        return storage is None or getattr(storage, _REACHED, None) is self.run

    def _held(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the numbers of constants that are real tensors; of a long one the first."""
        parts = (part for one in inputs for part in (one if isinstance(one, tuple | list) else (one,)))
        real = [part for part in parts if isinstance(part, Tensor) and not part.is_meta and not self._is_reached(part)]
        return [tensor.detach().flatten()[:1000].tolist() for tensor in real]

    def _is_constant(self, function: Any, inputs: Sequence[Any], made: list[Tensor]) -> bool:
        """Check whether new tensors come out that no input, weight or random draw has a part in."""
        if not made or not is_pure(function):
            return False
        return not any(self._is_reached(tensor) for one in inputs for tensor in _tensors(one))

    def note(self, what: str, tensors: Any, numbers: Any = "", where: dict[str, list[str]] | None = None) -> None:
        """Enter something with the shapes of its tensors and other arguments."""
        entries = (self.operators if where is None else where).setdefault(self.scope, [])
        entries.append(f"{what}{map_shapes(tensors)}{numbers}")


class _Interpreter(Runner):
    """Runs a trace and notes each node's shape, and tensors that changed between their node and its user."""

    def __init__(self, traced: Trace, log: Log) -> None:
        super().__init__(traced.root, graph=traced.graph)  # type: ignore[arg-type]
        self.log = log
        self.shapes: Shapes = {}
        self.changed: set[tuple[str, str]] = set()
        self.content: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.log.scope = n.meta.get("scope", "")
        for before in n.all_input_nodes:
            if before in self.content and _content(self.env[before]) != self.content[before]:
                self.changed.add((before.name, n.name))
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name], self.content[n] = tuple(value.shape), _content(value)
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.shapes[n.name] = "tuple"
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.log.note(target, (args, kwargs))
        self.log.quiet = True
        module = self.fetch_attr(target)
        try:
            if type(module) in _SLOW and "forward" not in vars(module) and len(args) == 1:
                return torch.empty_like(args[0])
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
    log = Log(traced.root, inputs)
    runner = _Interpreter(traced, log)
    with torch.device("meta"), fixed_random_state(), put_back(traced.root), log:
        runner.run(*inputs.tensors)
    return Measured(traced, inputs, runner.shapes, frozenset(runner.changed), log.operators, log.flops)


def map_shapes(tensors: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors in nested containers."""
    return [tuple(tensor.shape) for tensor in _tensors(tensors)]


def _tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes with a tensor's values, or with what it lies on."""
    storage = storage_of(tensor)
    return tensor._version, getattr(storage, _WRITES, 0), storage


def _weightless(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
