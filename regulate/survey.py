"""Surveys a network: traces it, measures it and says of each residual block how it would be regulated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .config import RegulatorConfig
from .errors import first_line
from .fidelity import checked, measure_odd
from .find import Dataflow, Found, entering, find
from .fusion import Norm
from .measure import Measured, measure
from .origin import Source, has_running_statistics, is_norm, origin
from .paths import common_prefix, join
from .plan import Block, Skipped
from .site import Site
from .trace import Trace, holds_convolution, is_convolution, traces

_DEFAULT_GRID = {1: (224,), 2: (224, 224), 3: (16, 112, 112)}


@dataclass(frozen=True)
class Survey:
    """What a network holds.

    Args:
        sites: blocks that can be regulated, in forward order.
        skipped: what cannot, with the reason.
        input_size: one image, (C, H, W), of the first part that was measured.
        macs: multiply-adds of one image, of the parts that hold blocks.
    """

    sites: list[Site]
    skipped: list[Skipped]
    input_size: tuple[int, ...]
    macs: int


def wished_size(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The spatial size asked for, else that of timm's `pretrained_cfg`, else None."""
    if isinstance(input_size, int):
        return (input_size, input_size)
    if input_size is not None:
        return tuple(input_size)[1:] if len(input_size) > 2 else tuple(input_size)
    config = getattr(model, "pretrained_cfg", None)
    known = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    return tuple(known)[1:] if known else None


def survey(bare: nn.Module, config: RegulatorConfig, wished: tuple[int, ...] | None) -> Survey:
    """Traces, measures and searches a model, or its parts where the whole cannot be traced.

    Args:
        bare: the model's skeleton.
        config: decides norm and activation of what is new.
        wished: spatial size to measure at; None takes a default.
    """
    sites: list[Site] = []
    skipped: list[Skipped] = []
    size: tuple[int, ...] = ()
    macs = 0
    for root, made in traces(bare):
        if isinstance(made, str):
            skipped.append(Skipped(root, f"cannot be traced as a whole: {made}"))
            continue
        try:
            measured, image, cost = _measured(made, wished)
        except Exception as error:
            why = f"does not run at the planned input size: {first_line(error)}; give input_size="
            skipped.append(Skipped(root, why))
            continue
        odd = measure_odd(made, image)
        kinds = list(_blocks(Dataflow(made, measured), root, config, None if odd is None else odd.shapes))
        kinds = checked(kinds, made, measured, image, odd)
        if kinds:
            size, macs = size or image, macs + cost
        sites += [kind for kind in kinds if isinstance(kind, Site)]
        skipped += [kind for kind in kinds if isinstance(kind, Skipped)]
        skipped += [Skipped(join(root, path), f"cannot be opened: {why}") for path, why in made.closed.items()]
    found = [site.block.name for site in sites]
    # A whole whose parts gave blocks was not left alone.
    left = [s for s in dict.fromkeys(skipped) if not any(name.startswith(s.name and f"{s.name}.") for name in found)]
    return Survey(sites, left, size, macs)


def _measured(made: Trace, wished: tuple[int, ...] | None) -> tuple[Measured, tuple[int, ...], int]:
    """Shapes, the image size they hold for, and the multiply-adds of one image."""
    first = next((m for node in made.graph.nodes if isinstance(m := made.module(node), _ConvNd)), None)
    if first is None:
        raise ValueError("it calls no convolution that can be seen")
    dims = len(first.kernel_size)
    grid = wished or _DEFAULT_GRID[dims]
    if len(grid) != dims:
        raise ValueError(f"its convolutions have {dims} spatial axes, the input {len(grid)}")
    failure: Exception | None = None
    # What a network takes is what its first convolution takes, unless something rearranges the image before.
    for channels in dict.fromkeys((first.in_channels, 3, 1)):
        try:
            with torch.no_grad():
                measured = measure(made, (2, channels, *grid))
        except Exception as error:
            failure = failure or error
            continue
        # Of two images, at two operations a multiply-add.
        return measured, (channels, *grid), measured.flops // 4
    assert failure is not None
    raise failure


def _blocks(flow: Dataflow, root: str, config: RegulatorConfig, odd: dict[str, Any] | None) -> Iterator[Site | Skipped]:
    found = find(flow)
    homes = [_home(flow, block) for block in found]
    shared = Counter(homes)
    targets = Counter(str(node.target) for node in flow.traced.graph.nodes if node.op == "call_module")
    for block, home in zip(found, homes, strict=True):
        name = join(root, home)
        reason = block.reason or _unfit(flow, block, home, shared[home], targets)
        fitted = "" if reason else _fitted(flow, block, root, home, config, odd)
        if isinstance(fitted, Site):
            yield fitted
        else:
            yield Skipped(name or str(block.addition.name), reason or fitted)


def _home(flow: Dataflow, block: Found) -> str:
    """The innermost module that runs a block's addition and convolutions; in a graph, that holds the convolutions."""
    if isinstance(flow.traced.root, fx.GraphModule):
        return common_prefix([str(node.target).rpartition(".")[0] for node in block.convolutions])
    home = common_prefix([node.meta["scope"] for node in (block.addition, *block.convolutions)])
    while home and home not in flow.traced.calls:
        home = home.rpartition(".")[0]
    return home


def _unfit(flow: Dataflow, block: Found, home: str, residuals: int, targets: Counter[str]) -> str:
    is_graph = isinstance(flow.traced.root, fx.GraphModule)
    if not home and is_graph:
        return "its convolutions have no parent module in common, whose name would be the block's"
    if not home:
        return "the block is not a module of its own: its addition stands in the forward of the traced network itself"
    if not is_graph and len(flow.traced.calls[home]) > 1:
        return "the module is called more than once, so its weights are shared between steps"
    if residuals > 1:
        return f"{residuals} residual additions stand in this one module, and a regulator needs a module of its own"
    if "forward" in vars(flow.traced.root.get_submodule(home)):
        return "its forward is replaced on the instance"
    points = {str(node.target) for node in (block.read, block.write) if node is not None}
    if any(targets[point] > 1 for point in points):
        return "a convolution at its read or write point is called more than once"
    return ""


def _fitted(
    flow: Dataflow, found: Found, root: str, home: str, config: RegulatorConfig, odd: dict[str, Any] | None
) -> Site | str:
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
        return f"the grids of its read and write points, {pairs[0][0]} and {pairs[0][1]}, differ by more than a stride"
    known = origin(flow, write, found.write)
    block = Block(
        name=join(root, home),
        read=join(root, _door(flow, found.read, home)),
        write=join(root, _door(flow, found.write, home)),
        read_width=read_shape[1],
        write_width=write_shape[1],
        stride=steps[0],
        crop=steps[1],
        dims=len(write_shape) - 2,
        activation=known.fixed_point if config.fusion == "paper" else "none",
        norm=_norm(flow.traced.root.get_submodule(home), config.norm),
        sources=tuple(_rooted(source, root) for source in known.sources),
    )
    return Site(block, write_shape[2:], found, flow, root)


def _rooted(source: Source, root: str) -> Source:
    kind, colon, path = source.activation.partition(":")
    activation = f"{kind}:{join(root, path)}" if kind == "module" and colon else source.activation
    return replace(source, norm=source.norm and join(root, source.norm), activation=activation)


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


def _door(flow: Dataflow, conv: fx.Node, home: str) -> str:
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
