"""Builds the new modules of a stage: its cell, and for each block the fusion at its starting values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import RegulatorConfig
from ..schema.plan import Block, Stage
from ..schema.text import first_line
from ..utils.modes import in_mode, private_rng
from .cells import CELLS
from .identity_init import moments, settle
from .regulator import Fusion

_PROTOCOL = (
    "the protocol: cell(channels) builds an nn.Module whose forward(x, state) returns a tuple of tensors, H of x's "
    "shape and dtype first; state is what it returned for the block before, as a plain tuple, None for the first one; "
    "see regulate.nn.cells"
)


def build_cell(config: RegulatorConfig, channels: int, dims: int) -> nn.Module:
    """Return a fresh cell for maps of `channels` channels and `dims` spatial axes."""
    if isinstance(config.cell, str):
        return CELLS[config.cell](channels, config.kernel, dims)
    _check_call(config.cell, "a cell is built from one argument, its channel count", channels)
    cell = config.cell(channels)
    if not isinstance(cell, nn.Module):
        raise TypeError(f"cell must build an nn.Module from a channel count, got {type(cell).__name__}; {_PROTOCOL}")
    if any(is_lazy(tensor) for tensor in (*cell.parameters(), *cell.buffers())):
        raise TypeError(
            f"a cell's parameters are counted before it runs, and {type(cell).__name__} holds a lazy module, which has "
            "none yet; give its layers their sizes, which follow from the channel count"
        )
    return cell


def build_fusion(config: RegulatorConfig, block: Block, cell: nn.Module | None) -> Fusion:
    """Return the fusion of one block, in the form that its norm allows, with the values torch's layers start from."""
    residual = config.fusion == "residual"
    return Fusion(
        block.read_width,
        block.write_width,
        block.norm,
        normalise=not residual,
        # Without running statistics no affine makes norm(x) the identity: there x is added instead.
        skip=residual or block.norm.kind != "batch",
        activation=block.activation,
        dims=block.dims,
        cell=cell,
    )


def build_stage(model: nn.Module, stage: Stage, config: RegulatorConfig) -> dict[str, Fusion]:
    """Return the fusions of a stage by path of their block, the first with the stage's cell.

    Each lies on the device of its block's convolution, in its dtype, and in the block's training mode. The weights
    come from a generator of their own; the global one is left as it was.

    Args:
        model: the network, which is only read.
        stage: the stage's plan.
        config: the options.

    Raises:
        TypeError: a cell of the user's own breaks the cell protocol.
    """
    first = stage.blocks[0]
    fusions = {}
    with private_rng(config.seed, stage.index):
        cell = build_cell(config, first.read_width, first.dims)
        _check_new(cell, model.get_submodule(first.write))
        _check_protocol(cell, first)
        for block in stage.blocks:
            fusion = build_fusion(config, block, cell if block is first else None)
            weight = next(p for p in model.get_submodule(block.write).parameters() if p.dim() > 1)
            # First the dtype, in whose rounding the start is exact, then the values, then the device.
            start(fusion.to(weight.dtype), block, model, config.init)
            fusions[block.name] = fusion.to(weight.device).train(_is_training(model, block))
    return fusions


def _is_training(model: nn.Module, block: Block) -> bool:
    """Return the block's mode: a convolution ignores its own, and one that was exchanged may have another.

    In a GraphModule what held a block is an empty `nn.Module`, whose mode torch does not copy.
    """
    module = model.get_submodule(block.name)
    return (model.get_submodule(block.write) if type(module) is nn.Module else module).training


def start(fusion: Fusion, block: Block, model: nn.Module, init: str) -> None:
    """Put a fusion at its start. In place; random values come from the global CPU generator.

    Args:
        fusion: of the block.
        block: its plan.
        model: the network, which is only read.
        init: the option.
    """
    with torch.no_grad():
        fusion.mix.weight.normal_(std=1 / math.sqrt(fusion.mix.in_channels))
        if init == "random":
            return
        if fusion.skip:
            # Without a norm of the fused map the weight itself is zero.
            for tensor in tuple(fusion.mix_norm.parameters()) or (fusion.mix.weight,):
                tensor.zero_()
        else:
            sources = block.sources if init == "identity" else ()
            settle(fusion, *moments(model, sources, block.write_width))


def _check_protocol(cell: nn.Module, block: Block) -> None:
    """Run two steps of a cell on zeros, in eval mode: norms of its own learn nothing from that."""
    shape = (1, block.read_width, *(3,) * block.dims)
    like = next((p for p in cell.parameters() if p.is_floating_point()), torch.empty(0))
    _check_call(cell.forward, "a cell is called with its input and its state", torch.empty(0), None)
    state: Any = None
    with torch.no_grad(), in_mode(cell, training=False):
        for _ in range(2):
            x = torch.zeros(shape, dtype=like.dtype, device=like.device)
            given = (x, *(state or ()))
            versions = [part._version for part in given]
            try:
                new = cell(x, state)
            except Exception as error:
                what = "None" if state is None else "what it returned before"
                raise TypeError(
                    f"{type(cell).__name__} does not run on an input of {shape} with {what} as its state: "
                    f"{first_line(error)}; {_PROTOCOL}"
                ) from error
            _check_state(cell, new, x)
            _check_unwritten(cell, [part._version != old for part, old in zip(given, versions, strict=True)])
            state = tuple(new)  # as the block passes it on


def _check_new(cell: nn.Module, point: nn.Module) -> None:
    """Raise TypeError for a cell that was made for the plan, whose modules have no memory."""
    if any(p.is_meta for p in cell.parameters()) and not any(p.is_meta for p in point.parameters()):
        raise TypeError(
            f"each call of cell builds a new module, and this {type(cell).__name__} is on the meta device, as if it "
            "had been kept from the call that counts its parameters; build it anew each time"
        )


def _check_unwritten(cell: nn.Module, written: list[bool]) -> None:
    """Raise TypeError for a cell that changes what the block goes on to use, or a checkpoint to run again."""
    if any(written):
        what = "its input" if written[0] else "the state that it was given"
        raise TypeError(
            f"a cell makes new tensors, and {type(cell).__name__} writes to {what} in place; write h = x * 2 for "
            f"x.mul_(2), or begin with x.clone(); {_PROTOCOL}"
        )


def _check_state(cell: nn.Module, state: Any, x: Tensor) -> None:
    if not isinstance(state, tuple) or not all(isinstance(part, Tensor) for part in state) or not state:
        raise TypeError(
            f"a cell returns a tuple of tensors, {type(cell).__name__} returned {_shown(state)}; {_PROTOCOL}"
        )
    if state[0].shape != x.shape:
        raise TypeError(
            f"a cell's hidden state has the shape of its input, {tuple(x.shape)}; {type(cell).__name__} returned "
            f"{tuple(state[0].shape)}; use padding that keeps the grid"
        )
    if state[0].dtype != x.dtype:
        raise TypeError(
            f"a cell's hidden state has the dtype of its input, {x.dtype}; {type(cell).__name__} returned "
            f"{state[0].dtype}; convert it back"
        )


def _shown(state: Any) -> str:
    if isinstance(state, tuple):
        return f"({', '.join(type(part).__name__ for part in state)})"
    return f"a {type(state).__name__}"


def _check_call(function: Callable[..., Any], rule: str, *args: Any) -> None:
    """Raise TypeError where a function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise TypeError(f"{rule}, and {name} does not take them: {error}; {_PROTOCOL}") from error
    except ValueError:  # it has no signature that can be read
        return
