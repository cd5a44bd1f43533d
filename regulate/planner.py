"""plan(model): from residual blocks to stages that share a cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from .build import build_cell, build_fusion
from .config import RegulatorConfig
from .errors import NoBlocksError, UnknownStageError
from .guard import check_model, unwrapped
from .plan import Block, Plan, Skipped, Stage
from .skeleton import skeleton
from .survey import Site, common_prefix, survey, wished_size
from .trace import Call, constants, is_convolution, join, trace


def draw(model: nn.Module, config: RegulatorConfig, input_size: int | Sequence[int] | None = None) -> Plan:
    """Plans the rewrite of a model under a config; see `regulate.plan`."""
    check_model(model)
    model = unwrapped(model)
    bare = skeleton(model)
    seen = survey(bare, config, wished_size(model, input_size))
    if not seen.sites:
        raise NoBlocksError(_nothing_found(model, seen.skipped))
    runs = [(run, _holder(bare, run)) for run in _chains(seen.sites)]
    stages = _named(config, runs)
    chosen, left = _chosen(stages, config)
    if not chosen:
        raise NoBlocksError(_nothing_found(model, [*seen.skipped, *left]))
    return Plan(
        model=type(model).__name__,
        options=_options(config),
        input_size=seen.input_size,
        stages=tuple(chosen),
        skipped=tuple([*seen.skipped, *left]),
        base_parameters=sum(p.numel() for p in model.parameters()),
        base_macs=seen.macs,
    )


def _options(config: RegulatorConfig) -> dict[str, Any]:
    if isinstance(config.cell, str):
        return config.to_dict()
    named = replace(config, cell="lstm").to_dict()
    return {**named, "cell": getattr(config.cell, "__name__", type(config.cell).__name__)}


def _nothing_found(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    name = type(model).__name__
    rule = "regulate looks for an addition whose operands part at a common tensor, one way with two convolutions"
    if not any(is_convolution(module) for module in model.modules()):
        return f"no residual blocks in {name}: {rule}, and {name} has no convolution; give it a convolutional network"
    seen = "; ".join(f"{entry.name or name}: {entry.reason}" for entry in skipped[:4])
    return f"no residual blocks to regulate in {name}: {rule}; " + (
        f"left alone were {seen}" if seen else "there was none; for a network whose blocks are hidden from "
        "torch.fx, regulate the submodule that runs them"
    )  # fmt: skip


def _chains(sites: list[Site]) -> list[list[Site]]:
    """Runs of blocks in which each follows the one before it with equal widths and grid."""
    by_addition = {site.found.addition: site for site in sites}
    runs: list[list[Site]] = []
    run_of: dict[fx.Node, list[Site]] = {}
    for site in sites:
        before = site.found.before
        while before is not None and before not in by_addition:
            before = next((n for n in list(site.flow.chain(before))[1:] if n in by_addition), None)
        run = [] if before is None else run_of[before]
        # A second block behind the same one, as in parallel branches, begins a chain of its own.
        if not run or run[-1] is not by_addition.get(before) or _kind(site) != _kind(run[-1]):  # type: ignore[arg-type]
            run = []
            runs.append(run)
        run.append(site)
        run_of[site.found.addition] = run
    return runs


def _kind(site: Site) -> tuple[Any, ...]:
    return site.block.read_width, site.block.write_width, site.grid


@dataclass(frozen=True)
class _Holder:
    """Where a stage is run: a module's path, its method, and that method's constant arguments."""

    path: str
    method: str = ""
    fixed: tuple[tuple[str, Any], ...] = ()
    opened: tuple[str, ...] = ()


def _holder(bare: nn.Module, run: list[Site]) -> _Holder:
    """The smallest module that runs all blocks of the stage and can be traced alone."""
    common = common_prefix([site.block.name.split(".")[:-1] for site in run])
    site = run[0]
    while True:
        path = ".".join(common)
        calls = site.flow.traced.calls.get(path[len(site.root) :].lstrip("."), [])
        if path == site.root or len(calls) == 1:
            for method in ("forward_features", "forward"):
                holder = _tried(bare, path, method, calls[0] if calls else None, run)
                if holder is not None:
                    return holder
        if not common or path == site.root:
            return _Holder(path)
        common = common[:-1]


def _tried(bare: nn.Module, path: str, method: str, call: Call | None, run: list[Site]) -> _Holder | None:
    """The holder, if the module's method can be traced and runs the blocks."""
    module = bare.get_submodule(path)
    if not hasattr(module, method) or (method != "forward" and not _forward_calls(module, method)):
        return None
    opened = _opened(path, run)
    # What a module is called with is known of its forward alone.
    fixed = constants(module, method, call if method == "forward" else None)
    try:
        made = trace(module, lambda _, at: at in opened, method=method, fixed=fixed)
    except Exception:
        return None
    called = {join(path, str(node.target)) for node in made.graph.nodes if node.op == "call_module"}
    complete = {site.block.write for site in run} <= called
    paths = tuple(sorted(join(path, at) for at in opened))
    return _Holder(path, method, tuple(fixed.items()), paths) if complete else None


class _ReachedError(Exception):
    """Raised in place of a method's body."""


def _forward_calls(module: nn.Module, method: str) -> bool:
    """Whether a skeleton's forward goes through another of its methods."""

    def reached(*args: Any, **kwargs: Any) -> None:
        raise _ReachedError

    vars(module)[method] = reached
    try:
        trace(module)
    except _ReachedError:
        return True
    except Exception:
        return False
    finally:
        del vars(module)[method]
    return False


def _opened(holder: str, run: list[Site]) -> set[str]:
    """The modules to look into, relative to the holder: those above a read or write point.

    Where one of them takes a tuple, its code may ask for it, and a closed module would hand it a single
    symbol in the tuple's place: then those that return one are opened as well.
    """
    points = {point for site in run for point in (site.block.read, site.block.write)}
    opened = {above for point in points for above in _above(point, holder)}
    site = run[0]
    inside = {
        path: calls
        for at, calls in site.flow.traced.calls.items()
        if (path := join(site.root, at)) != holder and path.startswith(holder and f"{holder}.")
    }
    if any(_is_tuple(arg) for at in opened for call in inside.get(join(holder, at), []) for arg in call.args):
        makers = [path for path, calls in inside.items() if any(_is_tuple(call.result) for call in calls)]
        opened |= {above for path in makers for above in _above(f"{path}.", holder)}
    return opened


def _above(point: str, holder: str) -> list[str]:
    parts = point[len(holder) :].lstrip(".").split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _named(config: RegulatorConfig, runs: list[tuple[list[Site], _Holder]]) -> list[Stage]:
    held = Counter(holder.path for _, holder in runs)
    stages = []
    for index, (run, holder) in enumerate(runs):
        blocks = tuple(site.block for site in run)
        name = holder.path if holder.path and held[holder.path] == 1 else blocks[0].name
        parameters, macs = _count(config, blocks, math.prod(run[0].grid))
        place = (holder.path, holder.method, holder.fixed, holder.opened)
        stages.append(Stage(name, index, *place, blocks, run[0].grid, parameters, macs))
    return stages


def _count(config: RegulatorConfig, blocks: Sequence[Block], positions: int) -> tuple[int, int]:
    """New parameters and multiply-adds of a stage, counted on modules built without memory."""
    with torch.device("meta"):
        cell = build_cell(config, blocks[0].read_width, blocks[0].dims)
        fusions = [build_fusion(config, block, None) for block in blocks]
    parameters = sum(p.numel() for module in (cell, *fusions) for p in module.parameters())
    step = sum(p.numel() for p in cell.parameters() if p.dim() > 1)
    macs = sum(step + fusion.mix.weight.numel() for fusion in fusions) * positions
    return parameters, macs


def _chosen(stages: list[Stage], config: RegulatorConfig) -> tuple[list[Stage], list[Skipped]]:
    """The stages to regulate, and those left alone with the reason."""
    wanted = _wanted(stages, config)
    chosen, left = [], []
    for stage in stages:
        if not stage.method:
            left.append(Skipped(stage.name, "no module that runs its blocks can be traced"))
        elif wanted is None and len(stage.blocks) == 1:
            left.append(Skipped(stage.name, _alone(stage, stages)))
        elif wanted is not None and stage.index not in wanted:
            left.append(Skipped(stage.name, "not among the stages asked for"))
        else:
            chosen.append(stage)
    return chosen, left


def _alone(stage: Stage, stages: list[Stage]) -> str:
    """Why a stage of one block is left alone, and why it has one block."""
    near = [other for other in stages if abs(other.index - stage.index) == 1 and other.grid == stage.grid]
    why = " (the blocks next to it have other inner widths, and a cell has one)" if near else ""
    return f"a stage of one block{why} has nothing to carry; stages=[{stage.name!r}] regulates it all the same"


def _wanted(stages: list[Stage], config: RegulatorConfig) -> set[int] | None:
    if config.stages is None:
        return None
    there = ", ".join(f"{stage.name!r} ({stage.index})" for stage in stages)
    places: dict[str | int, int] = {stage.name: stage.index for stage in stages}
    places.update({stage.index: stage.index for stage in stages})
    for entry in config.stages:
        if entry not in places:
            raise UnknownStageError(f"there is no stage {entry!r}; this network has {there}, counted from 0")
    return {places[entry] for entry in config.stages}
