"""What regulated modules carry beside their regulators, and finding it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx, nn

from ..errors import NotRegulatedError, UnsupportedModelError
from ..schema.plan import Block, Stage
from ..utils.paths import join
from .carrier import Chain, Place

# Attributes on instances, so that classes can be cached and copies carry them.
PLACE = "_regulate_place"  # of a block: its `Place`
POINTS = "_regulate_points"  # of a module at a read or write point: its `Point`s
RECORD = "_regulate_record"  # of a container: its `Record`
# Of a fusion that a graph calls: the `Record` of that graph, whose own `meta` neither pickles nor transforms keep.
GRAPH = "_regulate_graph"
CHAIN = "_regulate_chain"  # of a fusion that a graph calls: its `Chain`


@dataclass(frozen=True)
class Point:
    """The role of a module at a read or write point.

    Args:
        place: its block's.
        reads: whether the map that enters it feeds the memory.
        writes: whether the fused map enters it instead.
    """

    place: Place
    reads: bool
    writes: bool


@dataclass(frozen=True)
class Record:
    """What was done below a container.

    Args:
        stages: the stages that it runs, their paths relative to it.
        chains: the identity of each stage.
        options: the plan's options.
        path: of the container in the model that was regulated.
    """

    stages: tuple[Stage, ...]
    chains: tuple[Chain, ...]
    options: dict[str, Any]
    path: str


def containers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """Yield path, module and record of everything in the model that runs regulated stages."""
    for path, module in model.named_modules():
        record = vars(module).get(RECORD) or (_of_graph(module) if isinstance(module, fx.GraphModule) else None)
        if record:
            yield path, module, record


def _of_graph(graph: fx.GraphModule) -> Record | None:
    """Return the record that the fusions of a graph carry, not that of a graph within it."""
    held = ((path, vars(module).get(GRAPH)) for path, module in graph.named_modules())
    return next((one for path, one in held if one and path == join(one.stages[0].blocks[0].name, "regulator")), None)


def regulated_blocks(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Yield path and place of every regulated block."""
    return ((path, place) for path, module in model.named_modules() if (place := vars(module).get(PLACE)))


def chains(model: nn.Module) -> tuple[Chain, ...]:
    """Return the chains that have a block in the model."""
    held = [vars(module).get(PLACE) or vars(module).get(CHAIN) for module in model.modules()]
    found = [one.chain if isinstance(one, Place) else one for one in held if one is not None]
    return tuple({id(chain): chain for chain in found}.values())


def regulators(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of every block's regulator, in the model's order of blocks."""
    for path, module in model.named_modules():
        if CHAIN in vars(module):
            yield path, module
        elif PLACE in vars(module) and module._modules.get("regulator") is not None:
            yield join(path, "regulator"), module.get_submodule("regulator")


def regulator_keys(model: nn.Module) -> set[str]:
    """Return the keys of the regulators' tensors in the model's state dict, which a wrapper may have shortened."""
    roots = tuple(f"{path}." for path, _ in regulators(model))
    held = {id(tensor) for _, module in regulators(model) for tensor in (*module.parameters(), *module.buffers())}
    # Not the model's own, which may take no arguments.
    state = nn.Module.state_dict(model, keep_vars=True)
    return {key for key, value in state.items() if id(value) in held or key.startswith(roots)}


def is_regulated(model: nn.Module) -> bool:
    """Check whether the model carries regulators.

    Args:
        model: any module.

    Examples:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> is_regulated(resnet18()), is_regulated(regulate(resnet18()))
        (False, True)
    """
    return any(True for _ in regulators(model))


def check_regulated(model: nn.Module) -> None:
    """Raise NotRegulatedError for a model without regulators."""
    if not is_regulated(model):
        raise NotRegulatedError(
            f"this needs a regulated model, and {type(model).__name__} has no regulators; call regulate(model) first"
        )


def whole(model: nn.Module) -> set[Chain]:
    """Return the chains of which every block is in the model, at its place."""
    at: dict[Chain, set[int]] = {}
    for _, place in regulated_blocks(model):
        at.setdefault(place.chain, set()).add(place.index)
    return {chain for chain, indices in at.items() if len(indices) == chain.length}


def displaced(model: nn.Module) -> list[Chain]:
    """Return the chains of blocks that lie elsewhere than when they were regulated: their tensors have other names."""
    names: dict[int, list[str]] = {}
    for key, value in nn.Module.state_dict(model, keep_vars=True).items():
        names.setdefault(id(value), []).append(key)
    was = {
        (chain, index): join(join(path, block.name), "regulator.")
        for path, _, record in containers(model)
        for chain, stage in zip(record.chains, record.stages, strict=True)
        for index, block in enumerate(stage.blocks)
    }
    moved = []
    for path, place in regulated_blocks(model):
        regulator, name = model.get_submodule(path)._modules.get("regulator"), was.get((place.chain, place.index), "")
        own = () if regulator is None else regulator.parameters()
        keys = [key for tensor in own for key in names.get(id(tensor), ())]
        if keys and not any(key.startswith(name) for key in keys):
            moved.append(place.chain)
    return moved


def check_blocks_are_called(model: nn.Module) -> None:
    """Raise the fitting error for a model without regulators, or one whose blocks are nodes of a graph."""
    check_regulated(model)
    if any(CHAIN in vars(module) for module in model.modules()):
        raise UnsupportedModelError(
            "this follows the calls of blocks, and in a GraphModule blocks are nodes; regulate the network that the "
            "graph was traced from and look into that"
        )


def blocks(model: nn.Module) -> list[tuple[Block, ...]]:
    """Return the regulated blocks by stage, under their paths in the model."""
    return [
        tuple(renamed(block, partial(join, path)) for block in stage.blocks)
        for path, _, record in containers(model)
        for stage in record.stages
    ]


def renamed(block: Block, rename: Callable[[str], str]) -> Block:
    """Return a block with other paths in the place of its own."""
    return replace(block, name=rename(block.name), read=rename(block.read), write=rename(block.write))
