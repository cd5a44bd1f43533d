"""From a plan to a regulated network: first everything that can fail, then the edits, with their undo."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from .._compat.modules import without_global_hooks
from ..config import RegulatorConfig
from ..errors import UnsupportedModelError
from ..nn.factory import build_stage
from ..nn.regulator import Fusion
from ..schema.plan import Plan, Stage
from ..schema.text import first_line
from ..utils.classes import Part, become, core, is_plain, subclass
from ..utils.locks import one_at_a_time
from ..utils.paths import is_inside, join, relative
from .carrier import Chain, Place
from .graph import install_in_graph, uninstall_from_graph
from .lookup import PLACE, RECORD, Point, Record, chains, containers, regulated_blocks, renamed, whole
from .points import Pointed, forget_points, mark
from .wrapped import Block as RegulatedBlock
from .wrapped import Container, release


@dataclass(frozen=True)
class Prepared:
    """Everything that a rewrite needs, made without a change to the model.

    Args:
        plan: what is done.
        fusions: the new modules, by path of their block.
    """

    plan: Plan
    fusions: dict[str, Fusion]

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the new tensors, under all names that they will have in the network that this was prepared for."""
        state: dict[str, Tensor] = {}
        fusions = {model.get_submodule(block): fusion for block, fusion in self.fusions.items()}
        for path, module in model.named_modules(remove_duplicate=False):
            if module in fusions:
                fusions[module].state_dict(destination=state, prefix=f"{join(path, 'regulator')}.")
        return state

    def install(self, model: nn.Module) -> None:
        """Carry the rewrite out, once. If that fails, everything that was done is undone.

        Args:
            model: the network that this was prepared for, without wrappers, or a copy of it.
        """
        undo = ExitStack()
        try:
            for path in dict.fromkeys(stage.container for stage in self.plan.stages):
                _install(model, path, self.plan, self.fusions, undo)
        except BaseException:
            undo.close()
            raise


@one_at_a_time()
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
        for block in stage.blocks:
            _check_name(model.get_submodule(block.name), block.name)
        if not isinstance(model.get_submodule(stage.container), fx.GraphModule):
            _check_classes(model, stage)
    # The new parameters can be trained wherever regulate was called.
    fusions: dict[str, Fusion] = {}
    with torch.inference_mode(False), without_global_hooks():
        for stage in plan.stages:
            fusions |= build_stage(model, stage, config)
    return Prepared(plan, fusions)


def _check_name(module: nn.Module, path: str) -> None:
    try:
        taken = hasattr(module, "regulator")  # also by a `__getattr__` of the user's, which dir does not know of
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


def _install(model: nn.Module, path: str, plan: Plan, fusions: dict[str, Fusion], undo: ExitStack) -> None:
    """Regulate the stages of one container. In place; each edit is entered in `undo` before it is made."""
    container = model.get_submodule(path)
    stages = tuple(_below(stage, path) for stage in plan.stages if stage.container == path)
    made = tuple(Chain(f"stage {stage.name}", len(stage.blocks)) for stage in stages)
    record = Record(stages, made, plan.options, path)
    own = {relative(block, path): fusion for block, fusion in fusions.items() if is_inside(block, path)}
    if isinstance(container, fx.GraphModule):
        install_in_graph(container, record, own, undo)
        return
    undo.callback(release, container, RECORD)
    undo.callback(_clear, container, made)
    for stage, chain in zip(stages, made, strict=True):
        for index, block in enumerate(stage.blocks):
            read, write = relative(block.read, block.name), relative(block.write, block.name)
            place = Place(chain, index, block.stride, block.crop, read, write)
            _install_block(container.get_submodule(block.name), place, own[block.name])
    vars(container)[RECORD] = record
    become(container, Container)


def _install_block(block: nn.Module, place: Place, fusion: Fusion) -> None:
    vars(block)[PLACE] = place
    # Not add_module: a class of the user's own may refuse or watch new attributes.
    block._modules["regulator"] = fusion
    become(block, RegulatedBlock)
    for path in dict.fromkeys((place.read, place.write)):
        mark(block.get_submodule(path), Point(place, path == place.read, path == place.write))


def _clear(model: nn.Module, gone: Collection[Chain]) -> None:
    """Take the regulators of some chains out, and the roles from their blocks and points. In place."""
    for module in list(model.modules()):
        forget_points(module, gone)
        place = vars(module).get(PLACE)
        if place is not None and place.chain in gone:
            release(module, PLACE)
            module._modules.pop("regulator", None)


def _below(stage: Stage, path: str) -> Stage:
    """Return the stage in paths relative to its container; how the start was chosen is of no use any more."""
    blocks = (renamed(block, lambda own: relative(own, path)) for block in stage.blocks)
    return replace(stage, blocks=tuple(replace(block, sources=()) for block in blocks))


def check_removable(model: nn.Module) -> None:
    """Raise UnsupportedModelError where another tool has changed a class since, or for a part of a stage."""
    # With its container, or without one: somebody may have put the blocks into another.
    known = {chain for _, _, record in containers(model) for chain in record.chains} | whole(model)
    for path, place in regulated_blocks(model):
        if place.chain not in known:
            raise UnsupportedModelError(
                f"a stage is taken apart as a whole, and {path or 'this module'} is one block of "
                f"{place.chain.name}; call unregulate on the module that runs all of it"
            )
    for path, module in model.named_modules():
        if not is_plain(module):
            raise UnsupportedModelError(
                f"another tool, such as fully_shard or parametrize, has changed the class of {path or 'the model'} "
                f"since it was regulated, to {type(module).__name__}; undo that first"
            )


def uninstall(model: nn.Module) -> None:
    """Give every object its class back and take the regulators out. In place; `check_removable` comes first."""
    held = list(containers(model))
    _clear(model, chains(model))
    for _, container, record in held:
        if isinstance(container, fx.GraphModule):
            uninstall_from_graph(container, record)
        else:
            release(container, RECORD)
