"""plan(model): from residual blocks in graphs to stages in names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .build import build_cell, build_fusion
from .config import RegulatorConfig
from .errors import NoBlocksError, UnknownStageError
from .find import Dataflow, Found, entering, find
from .fusion import Norm
from .guard import check_model
from .origin import has_running_statistics, is_norm, origin
from .plan import Block, Plan, Skipped, Stage
from .trace import Shapes, Trace, holds_convolution, is_convolution, skeleton, trace, traces

_DEFAULT_GRID = {1: (224,), 2: (224, 224), 3: (16, 112, 112)}
_ODD = {1: (131,), 2: (97, 131), 3: (9, 49, 65)}


@dataclass(frozen=True)
class _Site:
    """A block that can be regulated, with what stages are made of."""

    block: Block
    grid: tuple[int, ...]
    found: Found
    flow: Dataflow
    root: str


def draw(model: nn.Module, config: RegulatorConfig, input_size: int | Sequence[int] | None = None) -> Plan:
    """Plans the rewrite of a model under a config; see `regulate.plan`."""
    check_model(model)
    bare = skeleton(model)
    sites, skipped, size, macs = _survey(bare, config, _wished_size(model, input_size))
    if not sites:
        raise NoBlocksError(_nothing_found(model, skipped))
    runs = [(run, *_holder(bare, run)) for run in _chains(sites)]
    stages = _named(bare, config, runs)
    chosen, left = _chosen(stages, config)
    if not chosen:
        raise NoBlocksError(_nothing_found(model, [*skipped, *left]))
    return Plan(
        model=type(model).__name__,
        options=_options(config),
        input_size=size,
        stages=tuple(chosen),
        skipped=tuple([*skipped, *left]),
        base_parameters=sum(p.numel() for p in model.parameters()),
        base_macs=macs,
    )


def _options(config: RegulatorConfig) -> dict[str, Any]:
    if isinstance(config.cell, str):
        return config.to_dict()
    named = replace(config, cell="lstm").to_dict()
    return {**named, "cell": getattr(config.cell, "__name__", type(config.cell).__name__)}


def _nothing_found(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    name = type(model).__name__
    rule = "regulate looks for an addition whose operands part at a common tensor, with two convolutions or more on one way"
    if not any(is_convolution(module) for module in model.modules()):
        return f"no residual blocks in {name}: {rule}, and {name} has no convolution; give it a convolutional network"
    seen = "; ".join(f"{entry.name or name}: {entry.reason}" for entry in skipped[:4])
    return f"no residual blocks to regulate in {name}: {rule}; " + (
        f"left alone were {seen}" if seen else "there was none; for a network whose blocks are hidden from "
        "torch.fx, regulate the submodule that runs them"
    )  # fmt: skip


def _wished_size(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The spatial size asked for, else that of timm's `pretrained_cfg`, else None."""
    if isinstance(input_size, int):
        return (input_size, input_size)
    if input_size is not None:
        return tuple(input_size)[-3:][1:] if len(input_size) > 2 else tuple(input_size)
    config = getattr(model, "pretrained_cfg", None)
    known = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    return tuple(known)[1:] if known else None


def _survey(
    bare: nn.Module, config: RegulatorConfig, wished: tuple[int, ...] | None
) -> tuple[list[_Site], list[Skipped], tuple[int, ...], int]:
    """Traces, measures and searches the model, or its parts where the whole cannot be traced."""
    sites: list[_Site] = []
    skipped: list[Skipped] = []
    size: tuple[int, ...] = ()
    macs = 0
    for root, made in traces(bare):
        if isinstance(made, str):
            skipped.append(Skipped(root, f"cannot be traced as a whole: {made}"))
            continue
        try:
            shapes, image, cost = _measured(made, wished)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            skipped.append(Skipped(root, f"does not run on the planned input: {first}; give input_size="))
            continue
        size, macs = size or image, macs + cost
        flow = Dataflow(made, shapes)
        for kind in _blocks(flow, root, config, _odd(made, image)):
            (sites if isinstance(kind, _Site) else skipped).append(kind)  # type: ignore[attr-defined]
        skipped += [Skipped(_join(root, path), f"cannot be opened: {why}") for path, why in made.closed.items()]
    return sites, _without_blocks_within(skipped, sites), size, macs


def _without_blocks_within(skipped: list[Skipped], sites: list[_Site]) -> list[Skipped]:
    """Drops 'cannot be traced as a whole' where the parts were traced and gave blocks."""
    inside = [site.block.name for site in sites]
    return [s for s in skipped if not any(name.startswith(f"{s.name}.") or not s.name for name in inside)]


def _measured(made: Trace, wished: tuple[int, ...] | None) -> tuple[Shapes, tuple[int, ...], int]:
    """Shapes, the image size they hold for, and the multiply-adds of one image."""
    from .trace import measure

    first = next(m for node in made.graph.nodes if (m := made.module(node)) is not None and is_convolution(m))
    dims = len(first.kernel_size)  # type: ignore[arg-type]
    grid = wished if wished and len(wished) == dims else _DEFAULT_GRID[dims]
    failure: Exception | None = None
    for channels in dict.fromkeys((first.in_channels, 3, 1)):
        with FlopCounterMode(display=False) as counter:
            try:
                shapes = measure(made, (2, channels, *grid))  # type: ignore[arg-type]
            except Exception as error:
                failure = failure or error
                continue
        return shapes, (channels, *grid), counter.get_total_flops() // 4  # type: ignore[return-value]
    assert failure is not None
    raise failure


def _odd(made: Trace, image: tuple[int, ...]) -> Shapes | None:
    """Shapes at an odd size, which tells poolings that round down; None where the model refuses it."""
    from .trace import measure

    try:
        return measure(made, (2, image[0], *_ODD[len(image) - 1]))
    except Exception:
        return None


def _blocks(
    flow: Dataflow, root: str, config: RegulatorConfig, odd: Shapes | None
) -> Iterator[_Site | Skipped]:
    found = find(flow)
    homes = [_home(flow, block) for block in found]
    shared = Counter(homes)
    targets = Counter(str(node.target) for node in flow.traced.graph.nodes if node.op == "call_module")
    for block, home in zip(found, homes, strict=True):
        name = _join(root, home)
        reason = block.reason or _unfit(flow, block, home, shared[home], targets)
        fitted = "" if reason else _fitted(flow, block, root, home, config, odd)
        if isinstance(fitted, _Site):
            yield fitted
        else:
            yield Skipped(name or str(block.addition.name), reason or fitted)


def _home(flow: Dataflow, block: Found) -> str:
    """The innermost module that runs the addition and the branch's convolutions."""
    scopes = [node.meta["scope"].split(".") for node in (block.addition, *block.convolutions)]
    common = []
    for parts in zip(*scopes, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and ".".join(common) not in flow.traced.calls:
        common.pop()
    return ".".join(common)


def _unfit(flow: Dataflow, block: Found, home: str, residuals: int, targets: Counter[str]) -> str:
    if not home:
        return "the block is not a module of its own: its addition stands in the forward of the traced network itself"
    if residuals > 1:
        return f"{residuals} residual additions stand in this one module, and a regulator needs a module of its own"
    if len(flow.traced.calls[home]) > 1:
        return "the module is called more than once, so its weights are shared between steps"
    if "forward" in vars(flow.traced.root.get_submodule(home)):
        return "its forward is replaced on the instance"
    points = {str(node.target) for node in (block.read, block.write) if node is not None}
    if any(targets[point] > 1 for point in points):
        return "a convolution at its read or write point is called more than once"
    return ""


def _fitted(
    flow: Dataflow, found: Found, root: str, home: str, config: RegulatorConfig, odd: Shapes | None
) -> _Site | str:
    assert found.read is not None and found.write is not None
    read, write = entering(found.read), entering(found.write)
    read_shape, write_shape = flow.shape(read), flow.shape(write)
    if read_shape is None or write_shape is None or len(read_shape) != len(write_shape):
        return "its read or write point is no image-like tensor"
    pairs = [(read_shape[2:], write_shape[2:])]
    if odd and read.name in odd and write.name in odd:
        pairs.append((odd[read.name][2:], odd[write.name][2:]))
    steps = _steps(pairs)
    if steps is None:
        return f"the grids {read_shape[2:]} and {write_shape[2:]} of its read and write points differ by more than a stride"
    source = origin(flow, write)
    block = Block(
        name=_join(root, home),
        read=_join(root, _door(flow, found.read, home)),
        write=_join(root, _door(flow, found.write, home)),
        read_width=read_shape[1],
        write_width=write_shape[1],
        stride=steps[0],
        crop=steps[1],
        dims=len(write_shape) - 2,
        activation=source.fixed_point if config.fusion == "paper" else "none",
        norm=_norm(flow.traced.root.get_submodule(home), config.norm),
        sources=source.sources,
    )
    return _Site(block, write_shape[2:], found, flow, root)


def _steps(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[tuple[int, ...], bool] | None:
    """The stride per axis that turns every read grid into its write grid, and whether it takes a cut."""
    read, write = pairs[0]
    stride = tuple(max(1, round(r / w)) for r, w in zip(read, write, strict=True))
    crop = False
    for read, write in pairs:
        for r, w, s in zip(read, write, stride, strict=True):
            if w not in (math.ceil(r / s), r // s):
                return None
            crop = crop or w != math.ceil(r / s)
    return stride, crop


def _door(flow: Dataflow, conv: Any, home: str) -> str:
    """The outermost module inside the block that the convolution's input enters unchanged."""
    path = str(conv.target)
    parts = path.split(".")
    for depth in range(len(home.split(".")) + 1, len(parts)):
        outer = ".".join(parts[:depth])
        calls = flow.traced.calls.get(outer, [])
        if len(calls) == 1 and calls[0].args and calls[0].args[0] is entering(conv):
            return outer
    return path


def _norm(block: nn.Module, wish: str) -> Norm:
    """The norm of what is new: the block's own kind, or the one that was asked for."""
    norms = [m for m in block.modules() if not is_convolution(m) and not holds_convolution(m) and is_norm(m)]
    batch = [m for m in norms if has_running_statistics(m)]
    model = (batch or norms or [None])[0]  # type: ignore[list-item]
    kind = wish if wish != "auto" else "batch" if batch else "group" if norms else "none"
    return Norm(
        kind=kind,
        eps=float(getattr(model, "eps", 1e-5)),
        momentum=getattr(model, "momentum", 0.1) if batch else 0.1,
        groups=int(getattr(model, "num_groups", 32)),
    )


def _chains(sites: list[_Site]) -> list[list[_Site]]:
    """Runs of blocks in which each follows the one before it with equal widths and grid."""
    by_addition = {site.found.addition: site for site in sites}
    runs: list[list[_Site]] = []
    run_of: dict[Any, list[_Site]] = {}
    for site in sites:
        before = site.found.before
        while before is not None and before not in by_addition:
            before = next((n for n in list(site.flow.chain(before))[1:] if n in by_addition), None)
        last = by_addition.get(before) if before is not None else None
        run = run_of.get(before)
        if last is None or run is None or run[-1] is not last or _kind(site) != _kind(last):
            run = []
            runs.append(run)
        run.append(site)
        run_of[site.found.addition] = run
    return runs


def _kind(site: _Site) -> tuple[Any, ...]:
    return site.block.read_width, site.block.write_width, site.grid


def _holder(bare: nn.Module, run: list[_Site]) -> tuple[str, str]:
    """The smallest module that runs all blocks of the stage and can be traced alone, and its method."""
    parts = [site.block.name.split(".")[:-1] for site in run]
    common = parts[0]
    for other in parts[1:]:
        common = [a for a, b in zip(common, other, strict=False) if a == b][: _agree(common, other)]
    site = run[0]
    calls = site.flow.traced.calls
    while True:
        path = ".".join(common)
        inner = path[len(site.root) :].lstrip(".")
        called_once = path == site.root or len(calls.get(inner, [])) == 1
        if called_once and (method := _method(bare.get_submodule(path), path, run)):
            return path, method
        if not common or path == site.root:
            return path, ""
        common = common[:-1]


def _agree(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _method(module: nn.Module, path: str, run: list[_Site]) -> str:
    """The method of a holder that runs the blocks and traces; empty if there is none."""
    opened = opened_paths([site.block for site in run], path)
    for method in ("forward_features", "forward"):
        if not hasattr(module, method):
            continue
        try:
            made = trace(module, lambda _, at: at in opened, method=method)
        except Exception:
            continue
        targets = {str(node.target) for node in made.graph.nodes}
        if all(_join(path, str(t)) for t in targets) and {site.block.write for site in run} <= {
            _join(path, t) for t in targets
        }:
            return method
    return ""


def opened_paths(blocks: Sequence[Block], holder: str) -> set[str]:
    """The modules to look into, relative to the holder: those above a read or write point."""
    opened = set()
    for block in blocks:
        for point in (block.read, block.write):
            parts = point[len(holder) :].lstrip(".").split(".")
            opened |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return opened


def _named(bare: nn.Module, config: RegulatorConfig, runs: list[tuple[list[_Site], str, str]]) -> list[Stage]:
    held = Counter(holder for _, holder, _ in runs)
    stages = []
    for index, (run, holder, method) in enumerate(runs):
        blocks = tuple(site.block for site in run)
        name = holder if holder and held[holder] == 1 else blocks[0].name
        parameters, macs = _count(config, blocks, math.prod(run[0].grid))
        stages.append(Stage(name, index, holder, method, blocks, run[0].grid, parameters, macs))
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
            reason = f"a stage of one block has nothing to carry; stages=[{stage.name!r}] regulates it all the same"
            left.append(Skipped(stage.name, reason))
        elif wanted is not None and stage.index not in wanted:
            left.append(Skipped(stage.name, "not among the stages asked for"))
        else:
            chosen.append(stage)
    return chosen, left


def _wanted(stages: list[Stage], config: RegulatorConfig) -> set[int] | None:
    if config.stages is None:
        return None
    there = ", ".join(f"{stage.name!r} ({stage.index})" for stage in stages)
    places: dict[str | int, int] = {stage.name: stage.index for stage in stages}
    places.update({stage.index: stage.index for stage in stages})
    for entry in config.stages:
        if entry not in places:
            raise UnknownStageError(f"there is no stage {entry!r}; the stages of this network are {there}, counted from 0")
    return {places[entry] for entry in config.stages}


def _join(root: str, path: str) -> str:
    return f"{root}.{path}" if root and path else root or path
