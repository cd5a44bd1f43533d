"""plan(model): from residual blocks to stages that share a cell."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .._compat.modules import without_global_hooks
from ..config import RegulatorConfig
from ..errors import NoBlocksError, UnknownStageError
from ..nn.factory import build_cell, build_fusion
from ..schema.plan import Block, Plan, Skipped, Stage
from ..utils.locks import one_at_a_time
from ..utils.paths import common_prefix, join, relative
from .candidates import Survey, survey
from .fidelity import DISTURBED
from .inputs import Size, sizes
from .inputs import example as read_example
from .meta_copy import skeleton
from .site import Site
from .trace import holds_convolution, is_convolution

# How many modules are looked into for a part that works where the whole does not.
_PARTS = 12
_OPAQUE = "; torch.fx does not look into a module that holds no convolution: put what it cannot follow into one"


@one_at_a_time()
def make_plan(
    model: nn.Module,
    config: RegulatorConfig,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
) -> Plan:
    """Plan the rewrite of a model that has been checked and has no wrapper, under a config; see `regulate.plan`."""
    if input_size is not None and example_inputs is not None:
        raise TypeError(
            "example_inputs= have a size themselves, and input_size= was given beside them; pass one of both"
        )
    tried, example = sizes(model, input_size), read_example(model, example_inputs)
    if example is not None:  # for parts that a run of the whole does not reach
        tried = (Size(example.image[2:]), *tried)
    # Tensors of inference mode do not count how often they are written to; hooks are not for symbols and shapes.
    with torch.inference_mode(False), without_global_hooks():
        bare = skeleton(model)
        seen = survey(bare, config, tried, example)
    if not seen.sites:
        # Code that would take a regulator for a part of its own does so wherever that was put in from.
        disturbed = any(DISTURBED in entry.reason for entry in seen.skipped)
        advice = "" if disturbed else _next_step(bare, config, tried, seen)
        raise NoBlocksError(_nothing_found(model, seen.skipped) + advice)
    runs = [(run, _container(bare, run)) for run in _chains(seen.sites)]
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
    cell = config.cell
    name = cell if isinstance(cell, str) else getattr(cell, "__name__", type(cell).__name__)
    return {**replace(config, cell="lstm").to_dict(), "cell": name}


def _nothing_found(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    name = type(model).__name__
    rule = "regulate looks for an addition whose operands part at a common tensor, one way with two convolutions"
    if not any(is_convolution(module) for module in model.modules()):
        return (
            f"no residual blocks in {name}: {rule}, and {name} has no convolution that is "
            "a module (F.conv2d on parameters of one's own is not seen); give it a convolutional network"
        )
    seen = "; ".join(f"{entry.name or name}: {entry.reason}" for entry in skipped[:4])
    return f"no residual blocks to regulate in {name}: {rule}; " + (
        f"left alone were {seen}" if seen else "there was none; for a network whose blocks are hidden from "
        "torch.fx, regulate the submodule that runs them"
    )  # fmt: skip


def _next_step(bare: nn.Module, config: RegulatorConfig, tried: Sequence[Size], seen: Survey) -> str:
    """Return what to do where a network cannot be taken as a whole: the first part that can, or what hides its code."""
    waiting = list(seen.failed or [""])
    for at in itertools.islice(waiting, _PARTS):  # which grows meanwhile
        for name, child in bare.get_submodule(at).named_children():
            path = join(at, name)
            if not holds_convolution(child):
                continue
            has_forward = type(child).forward is not nn.Module.forward
            if has_forward and any(len(run) > 1 for run in _chains(survey(child, config, tried).sites)):
                code = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{path}")
                return f"; its part {path} can be regulated alone: {code} = regulate({code})"
            waiting.append(path)
    return _OPAQUE if any(entry.reason.startswith("cannot be ") for entry in seen.skipped) else ""


def _chains(sites: list[Site]) -> list[list[Site]]:
    """Return runs of blocks in which each follows the one before it with equal widths, grid and dtype."""
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
    return site.block.read_width, site.block.write_width, site.grid, site.dtype


def _container(bare: nn.Module, run: list[Site]) -> str:
    """Return the smallest module whose call runs all blocks of the stage, once."""
    site = run[0]
    path = common_prefix([site.block.name.rpartition(".")[0] for site in run])
    while path != site.root:
        calls = site.flow.traced.calls.get(relative(path, site.root), [])
        if len(calls) == 1 and "forward" not in vars(bare.get_submodule(path)):
            break
        path = path.rpartition(".")[0]
    return path


def _named(config: RegulatorConfig, runs: list[tuple[list[Site], str]]) -> list[Stage]:
    held = Counter(container for _, container in runs)
    stages = []
    for index, (run, container) in enumerate(runs):
        blocks = tuple(site.block for site in run)
        name = container if container and held[container] == 1 else blocks[0].name
        parameters, macs = _count(config, blocks, math.prod(run[0].grid))
        stages.append(Stage(name, index, container, blocks, run[0].grid, parameters, macs))
    return stages


def _count(config: RegulatorConfig, blocks: Sequence[Block], positions: int) -> tuple[int, int]:
    """Return new parameters and multiply-adds of a stage, counted on modules built without memory."""
    with torch.device("meta"):
        cell = build_cell(config, blocks[0].read_width, blocks[0].dims)
        fusions = [build_fusion(config, block, None) for block in blocks]
    parameters = sum(p.numel() for module in (cell, *fusions) for p in module.parameters())
    step = sum(p.numel() for p in cell.parameters() if p.dim() > 1)
    return parameters, sum(step + fusion.mix.weight.numel() for fusion in fusions) * positions


def _chosen(stages: list[Stage], config: RegulatorConfig) -> tuple[list[Stage], list[Skipped]]:
    """Return the stages to regulate, and those left alone with the reason."""
    wanted = _wanted(stages, config)
    chosen, left = [], []
    for stage in stages:
        if wanted is None and len(stage.blocks) == 1:
            left.append(Skipped(stage.name, _alone(stage, stages)))
        elif wanted is not None and stage.index not in wanted:
            left.append(Skipped(stage.name, "not among the stages asked for"))
        else:
            chosen.append(stage)
    return chosen, left


def _alone(own: Stage, stages: list[Stage]) -> str:
    """Why a stage of one block is left alone, and why it has one block."""
    near = any(abs(o.index - own.index) == 1 and o.grid == own.grid and _widths(o) != _widths(own) for o in stages)
    why = " (the blocks next to it have other inner widths, and a cell has one)" if near else ""
    return f"a stage of one block{why} has nothing to carry; stages=[{own.name!r}] regulates it all the same"


def _widths(stage: Stage) -> tuple[int, int]:
    return stage.blocks[0].read_width, stage.blocks[0].write_width


def _wanted(stages: list[Stage], config: RegulatorConfig) -> set[int] | None:
    if config.stages is None:
        return None
    there = ", ".join(f"{stage.name!r} ({stage.index})" for stage in stages)
    places: dict[str | int, int] = {key: s.index for s in stages for key in (s.blocks[0].name, s.name, s.index)}
    for entry in config.stages:
        if entry not in places:
            raise UnknownStageError(f"there is no stage {entry!r}; this network has {there}, counted from 0")
    return {places[entry] for entry in config.stages}
