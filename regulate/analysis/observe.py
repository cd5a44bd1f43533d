"""Running a skeleton's own code on the meta device, to be compared with its trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._compat.operators import tree_leaves
from ..nn.hiding import HidesRegulator
from ..utils.classes import Part, become, leave
from ..utils.modes import fixed_random_state
from .effects import left_behind, put_back
from .measure import Log, Measured, Observed


def observe(measured: Measured, points: Sequence[str], blocks: Sequence[str]) -> Observed:
    """Run the traced module's own code on the meta device; closed modules put out what they did in the trace.

    Args:
        measured: a run of its trace; the code runs on the same inputs.
        points: paths of the modules to watch.
        blocks: paths of the blocks; where one leaves something behind for its next call, that is entered like an
            operator, which no trace has.

    Raises:
        Exception: whatever the code raises.
    """
    try:
        # Numbers that are drawn and read at once must be real ones.
        return _observed(measured, points, blocks, nullcontext())
    except Exception:
        return _observed(measured, points, blocks, torch.device("meta"))


def _observed(
    measured: Measured, points: Sequence[str], blocks: Sequence[str], device: AbstractContextManager[Any]
) -> Observed:
    log, traced, inputs = Log(measured.traced.root, measured.inputs), measured.traced, measured.inputs
    passes: dict[str, list[tuple[int, tuple[int, ...]]]] = {path: [] for path in points}
    closed: dict[str, list[Any]] = {}
    for node in traced.graph.find_nodes(op="call_module"):
        closed.setdefault(str(node.target), []).append(measured.shapes.get(node.name))
    with device, fixed_random_state(), put_back(traced.root):  # and with it the forwards
        for path in traced.calls:
            module = traced.root.get_submodule(path)
            vars(module)["forward"] = _scoped(module, path, log, path in blocks)
        for path, shapes in closed.items():
            module = traced.root.get_submodule(path)
            vars(module)["forward"] = _played(module.forward, path, shapes, log)
        for path in points:
            module = traced.root.get_submodule(path)
            vars(module)["forward"] = _watched(module.forward, path, passes)
        with log:
            traced.root(*inputs.args, **inputs.kwargs)
    return Observed(log.operators, log.constants, passes)


def _scoped(module: nn.Module, path: str, log: Log, is_block: bool) -> Callable[..., Any]:
    """Return an opened module's forward, in whose scope operators are noted."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        outer, log.scope = log.scope, path
        before = left_behind(module) if is_block else []
        try:
            return forward(*args, **kwargs)
        finally:
            if is_block and left_behind(module) != before:
                log.note("leaves something behind", ())
            log.scope = outer

    return run


def _played(forward: Callable[..., Any], path: str, shapes: list[Any], log: Log) -> Callable[..., Any]:
    """Return a closed module's forward that puts out a map of the shape that it had in the trace, call by call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        log.note(path, (args, kwargs))
        shape = shapes.pop(0) if shapes else None
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        log.quiet = True
        try:
            return x.new_empty(shape) if x is not None and isinstance(shape, tuple) else forward(*args, **kwargs)
        finally:
            log.quiet = False

    return run


def _watched(forward: Callable[..., Any], path: str, passes: dict[str, list[Any]]) -> Callable[..., Any]:
    """Return a module's forward that notes what enters it, and in which order."""

    def run(*args: Any, **kwargs: Any) -> Any:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        passes[path].append((sum(map(len, passes.values())), () if x is None else tuple(x.shape)))
        return forward(*args, **kwargs)

    return run


class _Rewritten(Part):
    """In the place of the roles of points and containers: a subclass of a module's class."""


def _runner(root: nn.Module, block: str) -> str:
    """Return the path of the nearest module around a block that has a forward of its own."""
    path = block.rpartition(".")[0]
    while path and isinstance(root.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path


@contextmanager
def with_regulators(root: nn.Module, blocks: Sequence[str], points: Sequence[str]) -> Iterator[None]:
    """Let blocks of a skeleton hold something like a regulator, for the body, and its modules be of the later classes.

    Args:
        root: the skeleton.
        blocks: paths of the blocks; what holds them counts as the container that runs them.
        points: paths of the modules at their points.
    """
    modules = [module for path in blocks if "regulator" not in (module := root.get_submodule(path))._modules]
    regulator = nn.Module()  # to be found by code that goes over what a block holds; a call of it is an error
    regulator.mix, regulator.mix_norm = nn.Conv2d(2, 1, 1, device="meta"), nn.BatchNorm2d(1, device="meta")
    with ExitStack() as stack:
        for module in modules:
            stack.callback(vars(module)["_modules"].pop, "regulator", None)
            module._modules["regulator"] = regulator
            stack.callback(leave, module, HidesRegulator)
            become(module, HidesRegulator)
        for path in dict.fromkeys((*points, *(_runner(root, path) for path in blocks if path))):
            module = root.get_submodule(path)
            if not isinstance(module, Part | fx.GraphModule):
                with suppress(Exception):  # `install` says of which classes no subclass can be made
                    become(module, _Rewritten)
                    stack.callback(leave, module, _Rewritten)
        yield
