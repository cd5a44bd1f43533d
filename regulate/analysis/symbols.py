"""What stands for a tensor while torch.fx traces code, and what runs what it recorded."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from .._compat.compiler import import_compiler
from .._compat.modules import NoParameter

# What an assignment to changes a tensor; anything else is a mark of the user's on it.
_TENSOR_STATE = {"data", "grad", "requires_grad"}
# In a sized trace these are what they are, and no symbols.
PLAIN = (int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout)


class Runner(fx.Interpreter):
    """Runs a trace on the meta device."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor of the network; a constant of its code, which is a real one in the trace, without memory."""
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, Tensor) and value.dim() else value


class Symbol(NoParameter, fx.Proxy):
    """A symbol that passes for a tensor where code asks, and records what is done in place as such."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if not self.tracer.sized or callable(getattr(self.tracer.known(self), name)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        return len(self.tracer.known(self)) if self.tracer.sized else super().__len__()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _TENSOR_STATE:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            super().__setattr__(name, value)

    def __setitem__(self, at: Any, value: Any) -> None:
        # Who takes the map from here on takes what the assignment made of it.
        self.tracer.rebound.append((self, self.node))
        self.node = self.tracer.create_proxy("call_function", assigned, (self, at, value), {}).node


def assigned(x: Tensor, at: Any, value: Any) -> Tensor:
    """Assign to a part of a map; return the map."""
    x[at] = value
    return x


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch.fx would make an addition that allocates its result of `x += y`.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(Symbol, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


@contextmanager
def symbols_are_tensors() -> Iterator[None]:
    """Let `isinstance(x, Tensor)`, `torch.is_tensor(x)` and `torch.as_tensor(x)` take symbols for tensors.

    Only where Python code asks. A symbol whose `__class__` says so would be unpacked as a tensor by torch's C code,
    where it stands for a size, and that kills the process.
    """
    import_compiler()  # which the traced code may import: it would take the replacement for the built-in function
    original, converted = builtins.isinstance, torch.as_tensor

    def asked(value: Any, kind: Any) -> bool:
        if type(value) is Symbol and Tensor in (kind if type(kind) is tuple else getattr(kind, "__args__", (kind,))):
            return True
        return original(value, kind)

    def as_tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        return data.to(*args, **kwargs) if type(data) is Symbol else converted(data, *args, **kwargs)

    builtins.isinstance, torch.as_tensor = asked, as_tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance, torch.as_tensor = original, converted
