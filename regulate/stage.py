"""A rewritten holder as a module: the same object, in a subclass of its class that runs the new code."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import BlockCallError
from .fusion import Fusion
from .guard import MARK
from .splice import Code, Rewrite, generate
from .switch import is_off


def pass_through(*args: Any, **kwargs: Any) -> Any:
    """The `forward` of an opened block: the stage has run its code and hands over input and result.

    So hooks on the block see its true input and output. A plain function, not a method, because it is
    stored on the instance: pickle and deepcopy keep it as it is.

    Raises:
        BlockCallError: the block was called by hand, with its input alone.
    """
    if len(args) < 2:
        raise BlockCallError(
            "a block of a regulated stage needs the memory of the blocks before it and runs only inside its stage, "
            "but it was called by hand; call the stage that holds it, or unregulate(model) first"
        )
    return args[-1]


class RegulatedStage(nn.Module):
    """What a rewritten `nn.Sequential` becomes: its blocks can be indexed, counted and iterated as before.

    It is no longer an `nn.Sequential`, because that promises that calling the children one after the
    other gives the same, and tools take it at its word.
    """

    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, str):
            return self._modules[index]
        return list(self.children())[index]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        # timm's checkpoint_seq iterates over stages and calls what it gets. It must get the stage as one
        # unit, since the memory runs through it; everybody else looks for the blocks.
        if torch.compiler.is_compiling() or sys._getframe(1).f_code.co_name == "checkpoint_seq":
            return iter((self,))
        return iter(self.children())


def install(holder: nn.Module, rewrite: Rewrite, code: Code, fusions: dict[str, Fusion] | None = None) -> None:
    """Makes a holder run its new code. In place; cannot fail once the arguments are right.

    Args:
        holder: its class changes, its identity and everything it holds stay.
        rewrite: what was done.
        code: the generated code.
        fusions: new modules by block path; None if the blocks carry them already.
    """
    for block in rewrite.blocks:
        if fusions is not None:
            holder.get_submodule(block.name).add_module("regulator", fusions[block.name])
    for path in rewrite.opened:
        vars(holder.get_submodule(path))["forward"] = pass_through
    holder.__class__ = _subclass(type(holder), rewrite, code)


def uninstall(holder: nn.Module) -> None:
    """Gives a holder its class back and takes the regulators out. In place."""
    rewrite: Rewrite = getattr(type(holder), MARK)
    for path in rewrite.opened:
        vars(holder.get_submodule(path)).pop("forward", None)
    for block in rewrite.blocks:
        del holder.get_submodule(block.name).regulator
    holder.__class__ = type(holder)._regulate_original  # type: ignore[attr-defined]


def _subclass(original: type[nn.Module], rewrite: Rewrite, code: Code) -> type[nn.Module]:
    """A class like `original` that runs `code`; it is never looked up by name, pickling goes by `_restore`."""
    base = RegulatedStage if issubclass(original, nn.Sequential) else original
    members = {
        **_own_members(original),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        MARK: rewrite,
        "_regulate_original": original,
        # One by one: the dynamo of older versions follows functions of a class, not a record of them.
        **{f"_run_{name}": function for name, function in vars(code).items()},
        rewrite.method: _run,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce_ex,
    }
    return type(base.__name__, (base,), members)


def _own_members(original: type[nn.Module]) -> dict[str, Any]:
    """What a subclass of nn.Sequential has beyond it: those methods and attributes stay."""
    if not issubclass(original, nn.Sequential):
        return {}
    above = original.__mro__[: original.__mro__.index(nn.Sequential)]
    return {name: value for cls in reversed(above) for name, value in vars(cls).items() if not name.startswith("__")}


def _run(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the holder's new code; honours timm's gradient checkpointing flag, as the original would."""
    if is_off(self):
        run = self._run_plain_training if self.training else self._run_plain_evaluating
    else:
        run = self._run_training if self.training else self._run_evaluating
    if getattr(self, "grad_checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(run, *args, use_reentrant=False, **kwargs)
    return run(*args, **kwargs)


def _copy(self: nn.Module) -> nn.Module:
    copied = type(self).__new__(type(self))
    copied.__dict__.update(self.__dict__)
    return copied


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copied = type(self).__new__(type(self))
    memo[id(self)] = copied
    copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return copied


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickles the original class, the contents and the rewrite; the code is generated anew on loading."""
    rewrite = getattr(type(self), MARK)
    return _blank, (type(self)._regulate_original,), (rewrite, self.__dict__), None, None, _restore  # type: ignore[attr-defined]


def _blank(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)


def _restore(holder: nn.Module, state: tuple[Rewrite, dict[str, Any]]) -> None:
    rewrite, contents = state
    holder.__setstate__(contents)  # type: ignore[operator, no-untyped-call]
    for path in rewrite.opened:
        vars(holder.get_submodule(path)).pop("forward", None)
    install(holder, rewrite, generate(holder, rewrite))
