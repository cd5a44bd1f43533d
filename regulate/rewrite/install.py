"""From a plan to a regulated network: first everything that can fail, then the edits, with their undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._compat.modules import without_global_hooks
from ..config import RegulatorConfig
from ..errors import UnsupportedModelError
from ..nn.factory import build_stage
from ..nn.regulator import Fusion
from ..schema.plan import Block, Plan, Stage
from ..schema.text import first_line
from ..utils.classes import Part, become, core, is_plain, subclass
from ..utils.locks import one_at_a_time
from ..utils.paths import relative
from .carrier import Chain, Place
from .graph import install_in_graph, uninstall_from_graph
from .lookup import PLACE, POINTS, RECORD, Point, Record, chains, containers, regulated_blocks, whole
from .points import Pointed, forget_points, mark
from .wrapped import Block as RegulatedBlock
from .wrapped import Container, release

Undo = list[Callable[[], None]]


@dataclass(frozen=True)
class Prepared:
    """Everything that a rewrite needs, made without a change to the model.

    Args:
        plan: what is done.
        fusions: the new modules, by path of their block.
    """

    plan: Plan
    fusions: dict[str, Fusion]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the new tensors, under the names that they will have."""
        return {
            f"{block}.regulator.{key}": value
            for block, fusion in self.fusions.items()
            for key, value in fusion.state_dict().items()
        }

    def install(self, model: nn.Module) -> None:
        """Carry the rewrite out, once. If that fails, everything that was done is undone.

        Args:
            model: the network that this was prepared for, without wrappers, or a copy of it.
        """
        undo: Undo = []
        try:
            for path, stages in _by_container(self.plan).items():
                _install(model, path, stages, self.plan.options, self.fusions, undo)
        except BaseException:
            for step in reversed(undo):
                step()
            raise


@one_at_a_time
def prepare(model: nn.Module, plan: Plan, config: RegulatorConfig) -> Prepared:
    """Build the modules that a plan asks for, and check that the model can take them.

    Args:
        model: the network that the plan was made for, without wrappers; only read.
        plan: the plan.
        config: the options it was made with.

    Raises:
        UnsupportedModelError: a block has something called `regulator`, or a module's class cannot be extended.
        TypeError: a cell of the user's own breaks the cell protocol.
    """
    for stage in plan.stages:
        container = model.get_submodule(stage.container)
        for block in stage.blocks:
            _check_name(model.get_submodule(block.name), block.name)
        if not isinstance(container, fx.GraphModule):
            _check_classes(model, stage)
    # The new parameters can be trained wherever regulate was called.
    with torch.inference_mode(False), without_global_hooks():
        fusions = {
            block.name: fusion
            for stage in plan.stages
            for block, fusion in zip(stage.blocks, build_stage(model, stage, config), strict=True)
        }
    return Prepared(plan, fusions)


def _check_name(module: nn.Module, path: str) -> None:
    try:
        taken = hasattr(module, "regulator")
    except Exception:  # a property of that name that cannot be read now
        taken = True
    if taken:
        raise UnsupportedModelError(
            f"regulate adds a submodule called `regulator` to each block, and {path} ({type(module).__name__}) has "
            "something of that name; rename it"
        )


def _check_classes(model: nn.Module, stage: Stage) -> None:
    _check_class(model.get_submodule(stage.container), Container, stage.container)
    for block in stage.blocks:
        _check_class(model.get_submodule(block.name), RegulatedBlock, block.name)
        for path in {block.read, block.write}:
            _check_class(model.get_submodule(path), Pointed, path)


def _check_class(module: nn.Module, role: type[Part], path: str) -> None:
    """Try the class that a module will get, on an empty object of its class."""
    own = core(type(module))
    if isinstance(module, role):  # by another network that shares the module
        return
    try:
        object.__setattr__(own.__new__(own), "__class__", subclass(role, own))
    except Exception as error:
        raise UnsupportedModelError(
            f"regulate gives {path or 'the model'} a subclass of its class, and {own.__name__} does not allow it: "
            f"{first_line(error)}; use a plain nn.Module subclass there, or leave that stage out with stages=[...]"
        ) from error


def _by_container(plan: Plan) -> dict[str, list[Stage]]:
    held: dict[str, list[Stage]] = {}
    for stage in plan.stages:
        held.setdefault(stage.container, []).append(stage)
    return held


def _install(
    model: nn.Module,
    path: str,
    stages: Iterable[Stage],
    options: dict[str, Any],
    fusions: dict[str, Fusion],
    undo: Undo,
) -> None:
    """Regulate the stages of one container. In place; each edit is entered in `undo` before it is made."""
    container = model.get_submodule(path)
    stages = tuple(stages)
    made = tuple(Chain(f"stage {stage.name}", len(stage.blocks)) for stage in stages)
    record = Record(tuple(_below(stage, path) for stage in stages), made, options)
    if isinstance(container, fx.GraphModule):
        install_in_graph(container, path, record, fusions, undo)
        return
    for stage, chain in zip(stages, made, strict=True):
        for index, block in enumerate(stage.blocks):
            _install_block(model, block, Place(chain, index, *_geometry(block)), fusions[block.name], undo)
    undo.append(lambda: release(container, RECORD))
    vars(container)[RECORD] = record
    become(container, Container)


def _install_block(model: nn.Module, block: Block, place: Place, fusion: Fusion, undo: Undo) -> None:
    module = model.get_submodule(block.name)

    def restore() -> None:
        for point in _points(model, block):
            forget_points(point, [place.chain])
        release(module, PLACE)
        module._modules.pop("regulator", None)

    undo.append(restore)
    # Not add_module: a class of the user's own may refuse or watch new attributes.
    module._modules["regulator"] = fusion
    vars(module)[PLACE] = place
    become(module, RegulatedBlock)
    for path in dict.fromkeys((block.read, block.write)):
        mark(model.get_submodule(path), Point(place, path == block.read, path == block.write))


def _points(model: nn.Module, block: Block) -> list[nn.Module]:
    return [model.get_submodule(path) for path in dict.fromkeys((block.read, block.write))]


def _geometry(block: Block) -> tuple[tuple[int, ...], bool, str, str]:
    return block.stride, block.crop, relative(block.read, block.name), relative(block.write, block.name)


def _below(stage: Stage, path: str) -> Stage:
    """Return the stage in paths relative to its container; how the start was chosen is of no use any more."""
    blocks = tuple(
        replace(
            block,
            name=relative(block.name, path),
            read=relative(block.read, path),
            write=relative(block.write, path),
            sources=(),
        )
        for block in stage.blocks
    )
    return replace(stage, blocks=blocks)


def check_removable(model: nn.Module) -> None:
    """Raise UnsupportedModelError where another tool has changed a class since, or for a part of a stage."""
    # With its container, or without one: somebody may have put the blocks into another.
    known = {chain for _, _, record in containers(model) for chain in record.chains} | whole(model)
    for path, block in regulated_blocks(model):
        if vars(block)[PLACE].chain not in known:
            raise UnsupportedModelError(
                f"a stage is taken apart as a whole, and {path or 'this module'} is one block of "
                f"{vars(block)[PLACE].chain.name}; call unregulate on the module that runs all of it"
            )
    for path, module in model.named_modules():
        if not is_plain(module):
            raise UnsupportedModelError(
                f"another tool, such as fully_shard or parametrize, has changed the class of {path or 'the model'} "
                f"since it was regulated, to {type(module).__name__}; undo that first"
            )


def uninstall(model: nn.Module) -> None:
    """Give every object its class back and take the regulators out. In place; `check_removable` comes first."""
    held, here = list(containers(model)), chains(model)
    blocks = [module for _, module in regulated_blocks(model)]
    points = [module for module in model.modules() if POINTS in vars(module)]
    for point in points:
        forget_points(point, here)
    for block in blocks:
        release(block, PLACE)
        block._modules.pop("regulator", None)
    for _, container, record in held:
        if isinstance(container, fx.GraphModule):
            uninstall_from_graph(container, record)
        else:
            release(container, RECORD)
