"""Surveys a network: traces it, measures it and says of each residual block how it would be regulated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from .._compat.modules import Convolution
from ..config import RegulatorConfig
from ..schema.plan import Block, Skipped
from ..schema.text import first_line
from ..schema.values import Norm, Source
from ..utils.paths import join
from .dataflow import Dataflow, entering
from .fidelity import checked, measure_trained
from .home import door, home_of, unfit
from .inputs import Inputs, Size, guessed, missing_arguments, recorded, shapes
from .measure import Measured, measure
from .provenance import has_running_statistics, is_norm, origin
from .residual_blocks import Found, find
from .site import Site
from .trace import Trace, holds_convolution, is_convolution, trace, traces


@dataclass(frozen=True)
class Survey:
    """What a network holds.

    Args:
        sites: blocks that can be regulated, in forward order.
        skipped: what cannot, with the reason.
        failed: paths of what could not be traced or measured as a whole.
        input_size: one image, (C, H, W), of the first part that was measured.
        macs: multiply-adds of one image, of the parts that hold blocks; None where torch does not tell.
    """

    sites: list[Site]
    skipped: list[Skipped]
    failed: list[str]
    input_size: tuple[int, ...]
    macs: int | None


def survey(bare: nn.Module, config: RegulatorConfig, sizes: Sequence[Size], example: Inputs | None = None) -> Survey:
    """Trace, measure and search a model, or its parts where the whole cannot be traced.

    Args:
        bare: the model's skeleton.
        config: decides norm and activation of what is new.
        sizes: image sizes to measure at; the first on which a part runs is taken.
        example: what the model is called with, instead of an image.
    """
    sites: list[Site] = []
    skipped: list[Skipped] = []
    failed: list[str] = []
    image: tuple[int, ...] = example.image[1:] if example else ()
    macs: int | None = 0
    known = recorded(bare, example) if example else {}
    for root, made in traces(bare, known, partial(_images, sizes)):
        try:
            measured = _measured(bare.get_submodule(root), made, sizes, known.get(root))
        except Exception as error:
            skipped.append(Skipped(root, first_line(error)))
            failed.append(root)
            continue
        trained = measure_trained(measured)
        kinds = checked(list(_blocks(Dataflow(measured), root, config, trained)), measured, trained)
        if kinds:
            image = image or measured.inputs.image[1:]
            flops, images = measured.flops, measured.inputs.image[0]
            macs = None if macs is None or flops is None else macs + flops // (2 * images)  # two operations each
        sites += [kind for kind in kinds if isinstance(kind, Site)]
        skipped += [kind for kind in kinds if isinstance(kind, Skipped)]
        closed = measured.traced.closed.items()
        skipped += [Skipped(join(root, path), f"cannot be opened: {why}") for path, why in closed]
    found = [site.block.name for site in sites]
    # A whole whose parts gave blocks was not left alone.
    left = [s for s in dict.fromkeys(skipped) if not any(name.startswith(s.name and f"{s.name}.") for name in found)]
    return Survey(sites, left, failed, image, macs)


@torch.no_grad()
def _measured(module: nn.Module, made: Trace | str, sizes: Sequence[Size], known: Inputs | None) -> Measured:
    """Return what a run of a module's trace shows.

    Raises:
        ValueError: there is no trace but a reason, or it runs on no inputs; the message is the reason.
    """
    if not known and (missing := missing_arguments(module)):
        raise ValueError(missing)
    if isinstance(made, str):
        raise ValueError(f"cannot be traced as a whole: {made}")
    if known is not None:
        try:
            return _run(made, known)
        except Exception as error:
            raise ValueError(f"does not run on example_inputs=: {first_line(error)}") from error
    if made.sized:
        return measure(made, made.inputs)
    first = next((m for node in made.graph.nodes if isinstance(m := made.module(node), Convolution)), None)
    if first is None or not made.inputs.tensors:
        raise ValueError("calls no convolution that can be seen; if that depends on arguments, give example_inputs=")
    failure = ""
    for inputs in _filled(made.inputs, module, first, sizes):
        try:
            return _run(made, inputs)
        except Exception as error:
            shape = "x".join(map(str, inputs.image[1:]))
            failure = failure or f"does not run on an image of {shape}: {first_line(error)}"
    # Other inputs do not help code that asks for numbers: a plan is made without arithmetic.
    raise ValueError(failure if "meta" in failure else f"{failure}; give input_size= or example_inputs=")


def _run(made: Trace, inputs: Inputs) -> Measured:
    """Run a trace; where that fails, one that knows what tensors are: a closed module may have returned None."""
    try:
        return measure(made, inputs)
    except Exception:
        with suppress(Exception):
            return measure(trace(made.root, inputs, sized=True), inputs)
        raise


def _images(sizes: Sequence[Size], module: nn.Module) -> Iterator[Inputs]:
    """Yield images that a module may take, by the first convolution that it holds."""
    first = next(filter(is_convolution, module.modules()), None)
    if first is not None and not missing_arguments(module):
        with suppress(ValueError):  # no size fits
            yield from _filled(guessed(module), module, first, sizes)


def _filled(inputs: Inputs, module: nn.Module, first: Any, sizes: Sequence[Size]) -> Iterator[Inputs]:
    """Yield inputs with an image for each tensor, as the module's first convolution takes it."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for shape in shapes(first.in_channels, len(first.kernel_size), sizes):
        yield inputs.replaced(lambda _, x: x.new_empty(shape, dtype=dtype))  # noqa: B023, called at once


def _blocks(flow: Dataflow, root: str, config: RegulatorConfig, trained: Measured | None) -> Iterator[Site | Skipped]:
    found = find(flow)
    homes = [home_of(flow, block) for block in found]
    shared = Counter(homes)
    targets = Counter(str(node.target) for node in flow.traced.graph.nodes if node.op == "call_module")
    for block, home in zip(found, homes, strict=True):
        name = join(root, home)
        reason = block.reason or unfit(flow, block, root, home, shared[home], targets)
        fitted = reason or _fitted(flow, block, root, home, config, trained)
        yield Skipped(name or str(block.addition.name), fitted) if isinstance(fitted, str) else fitted


def _fitted(
    flow: Dataflow, found: Found, root: str, home: str, config: RegulatorConfig, trained: Measured | None
) -> Site | str:
    read_shape, write_shape = (flow.shape(entering(node)) for node in found.points)
    if read_shape is None or write_shape is None or len(read_shape) != len(write_shape):
        return "its read or write point is no image-like tensor"
    pairs = [(read_shape[2:], write_shape[2:])]
    entered = [_entering(trained, node) for node in found.points] if trained is not None else []
    if entered and all(entered):
        pairs.append((entered[0][2:], entered[1][2:]))
    steps = _steps(pairs)
    if steps is None:
        return f"the grids of its read and write points, {pairs[0][0]} and {pairs[0][1]}, differ by more than a stride"
    last = flow.traced.root.get_submodule(str(found.points[1].target))
    dtype = next(p.dtype for p in last.parameters() if p.dim() > 1)
    if not dtype.is_floating_point:
        return f"its convolutions are of {dtype}, and a regulator computes in real floating-point numbers"
    known = origin(flow, entering(found.points[1]), found.points[1])
    block = Block(
        name=join(root, home),
        read=join(root, door(flow, found.points[0], home)),
        write=join(root, door(flow, found.points[1], home)),
        read_width=read_shape[1],
        write_width=write_shape[1],
        stride=steps[0],
        crop=steps[1],
        dims=len(write_shape) - 2,
        activation=known.fixed_point if config.fusion == "paper" else "none",
        norm=_norm(flow.traced.root.get_submodule(home), config.norm),
        sources=tuple(_rooted(source, root) for source in known.sources),
    )
    return Site(block, write_shape[2:], dtype, found, flow, root)


def _entering(measured: Measured, call: fx.Node) -> tuple[int, ...]:
    """Return the shape of what enters a module that another trace calls; empty where this one does not call it."""
    nodes = measured.traced.graph.find_nodes(op="call_module", target=call.target)
    return measured.shapes.get(entering(nodes[0]).name, ()) if nodes else ()


def _rooted(source: Source, root: str) -> Source:
    kind, colon, path = source.activation.partition(":")
    activation = f"{kind}:{join(root, path)}" if kind == "module" and colon else source.activation
    return replace(source, norm=source.norm and join(root, source.norm), activation=activation)


def _steps(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[tuple[int, ...], bool] | None:
    """Return the stride per axis that turns every read grid into its write grid, and whether it takes a cut."""
    axes = list(zip(*(zip(*pair, strict=True) for pair in pairs), strict=True))
    stride = tuple(map(_stride, axes))
    if not all(stride):
        return None
    return stride, any(w != math.ceil(r / s) for s, axis in zip(stride, axes, strict=True) for r, w in axis)


def _stride(axis: Sequence[tuple[int, int]]) -> int:
    """Return the stride from read to write sizes, which rounds, or leaves out a border of one width; 0 if none does."""
    most = max(1, round(axis[0][0] / axis[0][1]))
    if all(w in (math.ceil(r / most), r // most) for r, w in axis):
        return most
    # A border is what is left over. Rounding makes it s - 1 wider or narrower; what lies below -s would be upsampling.
    borders = {s: [r - s * w for r, w in axis] for s in range(most, 0, -1)}
    spread = {s: max(of) - min(of) for s, of in borders.items() if min(of) > -s}
    return min((s for s in spread if spread[s] <= 2 * (s - 1)), key=spread.__getitem__, default=0)


def _norm(block: nn.Module, wish: str) -> Norm:
    """Return the norm of what is new: the block's own kind, or the one that was asked for."""
    norms = [m for m in block.modules() if not is_convolution(m) and not holds_convolution(m) and is_norm(m)]
    batch = [m for m in norms if has_running_statistics(m)]
    model = (batch or norms or [None])[0]  # type: ignore[list-item]
    kind = wish if wish != "auto" else "batch" if batch else "group" if norms else "none"
    return Norm(
        kind=kind,
        eps=float(1e-5 if (eps := getattr(model, "eps", None)) is None else eps),  # torch's RMSNorm has None
        momentum=getattr(model, "momentum", 0.1) if batch else 0.1,
        groups=int(getattr(model, "num_groups", 32)),
    )
