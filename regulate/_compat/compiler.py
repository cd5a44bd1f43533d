"""torch.compile and torch.export: what they read and set, and what a compiled model is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn
from torch.torch_version import TorchVersion

# Whether torch.compile reads context variables, and compiles anew where they have changed.
COMPILER_READS_CONTEXT: bool = TorchVersion(torch.__version__) >= "2.14"
_EXPORT_IS_FLAGGED = hasattr(torch.compiler, "_is_exporting_flag")
_ALLOWING = "_disable_side_effect_safety_checks_for_current_subtracer"
_COMPILED = "_orig_mod"
# Where `nn.Module.compile` keeps the compiled call; torch's copies leave it out.
COMPILED_CALL = "_compiled_call_impl"
Function = TypeVar("Function", bound=Callable[..., Any])


def assign(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, also from compiled and checkpointed code, of an object that lives outside of it.

    Without the symbol, torch.compile breaks its graph at a checkpointed block.
    """
    if torch.compiler.is_compiling():
        # Imported here: torch's compiler takes more than a second to import.
        from torch._dynamo import utils

        allowed = getattr(utils, _ALLOWING, None)
        if allowed is not None:
            allowed(setattr, owner, name, value)
            return
    setattr(owner, name, value)


def is_exporting() -> bool:
    """Check whether torch.export traces. Without the symbol, yes as well where torch.compile does, in some versions.

    Not by `torch.compiler.is_exporting()`: the compiler takes that for true, at least up to torch 2.9.
    """
    return bool(torch.compiler._is_exporting_flag) if _EXPORT_IS_FLAGGED else torch.compiler.is_exporting()


def constant_while_compiling(function: Function) -> Function:
    """Mark a function that torch.compile calls while it traces, instead of tracing it.

    The mark is all that `torch.compiler.assume_constant_result` sets, but that imports the compiler, which takes a
    second. A compiler that does not know the mark traces the function, or breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def import_compiler() -> None:
    """Import what torch imports itself on the compiler's first use, timm and torchvision when they are imported."""
    import_module("torch._dynamo")


@contextmanager
def as_written() -> Iterator[None]:
    """Let compiled code run as it was written, with the hooks that it has now. What was compiled stays."""
    # Without the compiler there is none, and to import it takes a second.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


def compiled(model: nn.Module) -> nn.Module | None:
    """Return the model inside torch.compile's wrapper, which has no public class; None for any other module."""
    # Not .get(): a ScriptModule has children of another kind.
    return model.get_submodule(_COMPILED) if _COMPILED in model._modules else None
