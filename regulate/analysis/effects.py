"""What running a network's code leaves behind in Python: seen, and put back.

A plan runs the code of a skeleton, but the names of its classes and of their Python modules are the model's own:
counters and caches there must be after it what they were before. And a block that counts, draws or caches may take
another way in its next call than in the one that was looked at.
"""

from __future__ import annotations

import functools
import inspect
import operator
import pickle
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from .._compat.modules import FX_CONSTANT

# What torch itself keeps on a module, its tensors and children apart.
_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_PLAIN = (int, float, bool, str, type(None))
_CONTAINERS = (list, dict, set, deque)
_CACHE = type(functools.lru_cache(len))
_KEPT = (*_CONTAINERS, _CACHE)
_GENERATORS = (random.Random, np.random.Generator, torch.Generator)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Put back what runs of a model change: its attributes, what its classes and their modules hold, the grad mode.

    Args:
        model: a skeleton; its classes are the user's.
    """
    modules = list(model.modules())
    spaces: list[tuple[Any, Mapping[str, Any]]] = [(vars(module), dict(vars(module))) for module in modules]
    spaces += [shared for cls in {type(module) for module in modules} for shared in _shared(cls)]
    values = [value for _, held in spaces for name, value in held.items() if name not in _OWN]
    containers = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]
    caches = [value for value in values if type(value) is _CACHE]
    generators = [(value, _mark(value)) for value in values if type(value) in _GENERATORS]
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        for owner, held in spaces:
            _set(owner, held)
        for container, was in containers:
            _fill(container, was)
        for cache in caches:
            cache.cache_clear()
        for generator, state in generators:
            _rewind(generator, state)


def left_behind(module: nn.Module) -> list[Any]:
    """Return what tells whether a call of a module left something that its next call may look at.

    Of the module, its class and what its methods name: numbers, texts and flags, how much containers hold, where
    generators stand; and the random states.
    """
    spaces = [vars(module), *(held for _, held in _shared(type(module)))]
    marks = [_mark(value) for space in spaces for name, value in space.items() if name not in _OWN]
    return [*marks, random.getstate(), tuple(np.random.get_state())[2:], torch.get_rng_state().tolist()]


def _mark(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if type(value) in _CONTAINERS:
        return len(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    # Of a map that is kept: that there is one.
    return value.get_state().tolist() if isinstance(value, torch.Generator) else type(value)


def _rewind(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _shared(cls: type) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the classes and globals that a module's code may write to, with what they hold that is of interest."""
    for base in cls.__mro__:
        if not issubclass(base, nn.Module) or _is_torchs(base):
            continue
        yield base, _state(vars(base), vars(base))
        yield from _reached(vars(base).values())


def _reached(values: Iterable[Any]) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """Yield what functions hold, and those that they name: globals, defaults, and caches of functions."""
    waiting = [value for value in values if isinstance(value, FunctionType)]
    for function in waiting:  # which grows meanwhile
        space = function.__globals__
        yield space, _state(space, function.__code__.co_names)
        yield {}, {str(at): value for at, value in enumerate(function.__defaults__ or ()) if type(value) in _CONTAINERS}
        named: list[Any] = [space.get(name) for name in function.__code__.co_names]
        inner = [inspect.unwrap(value) for value in named if type(value) in (FunctionType, _CACHE)]
        waiting += [f for f in inner if isinstance(f, FunctionType) and not _is_torchs(f) and f not in waiting]


def _is_torchs(named: Any) -> bool:
    return str(named.__module__).partition(".")[0] == "torch"


def _state(space: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    held = {name: space[name] for name in names if name in space and not name.startswith("__")}
    return {name: value for name, value in held.items() if isinstance(value, _PLAIN) or type(value) in _KEPT}


def _set(owner: Any, held: Mapping[str, Any]) -> None:
    if isinstance(owner, type):
        for name, value in held.items():
            if vars(owner).get(name, owner) is not value:
                setattr(owner, name, value)
    elif not _is_same(owner, held):
        owner.update(held)
        if "_modules" in held:  # a module's own: what is new goes
            for name in [name for name in owner if name not in held and not name.startswith(FX_CONSTANT)]:
                del owner[name]


def _fill(container: Any, was: Any) -> None:
    """Give a container its content back, where that changed."""
    if not _is_same(container, was):
        container.clear()
        container.extend(was) if isinstance(container, list | deque) else container.update(was)


def _is_same(a: Any, b: Any) -> bool:
    """Check whether two containers hold the same objects, in their order. Not by ==, which maps have of their own."""
    if isinstance(a, dict) and not all(map(operator.is_, a.values(), b.values())):
        return False
    return len(a) == len(b) and all(map(operator.is_, a, b))
