"""Where the map at the write point comes from: which activation it is a fixed point of, which norm made it.

The fusion may apply an activation only if that leaves every possible input as it is, and its batch norm
needs the input's mean and variance. Both are read off the dataflow before the write point.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._compat.modules import BatchNorm, NormWithStatistics
from ..schema.values import Source
from .dataflow import Dataflow
from .meta_copy import has_hooks

# What keeps a map inside the range it came in: averages, maxima, blurs with non-negative taps.
_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_POOLS |= {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
# What multiplies by a factor that is positive; alpha dropout shifts besides.
_RESCALING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_SUMS = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
# Closed modules of other libraries that torch's own classes do not tell, by qualified name.
_POOL_CLASSES = {"timm.layers.blur_pool.BlurPool2d", "timm.layers.pool2d_same.AvgPool2dSame"}
_DROP_CLASSES = {"timm.layers.drop.DropBlock2d", "timm.layers.drop.DropPath", "torchvision.ops.drop_block.DropBlock2d"}
_FIXED_POINTS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu", F.relu6: "relu6",
    nn.ReLU: "relu", nn.ReLU6: "relu6",
}  # fmt: skip
_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_GATE_TARGETS = {torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"}
# What gives a map another type, and what puts its numbers elsewhere.
_CASTS = {"contiguous", "clone", "to", "type", "type_as", "float", "half", "double", "bfloat16"}
_MOVES = {"view", "reshape", "transpose", "permute", "flip", "roll", torch.transpose, torch.permute, torch.reshape}
_MOVES |= {torch.flip, torch.roll, torch.channel_shuffle}
_RESHAPES = {"view", "reshape", "expand", "expand_as", "unsqueeze", torch.unsqueeze, torch.reshape}


@dataclass(frozen=True)
class Origin:
    """What is known of a map: the activation that leaves it as it is, and its channels' sources."""

    fixed_point: str
    sources: tuple[Source, ...]


def is_norm(module: nn.Module) -> bool:
    """Check whether a module without convolutions normalises: torch's norms, or a 1-D `weight` (PReLU apart)."""
    if isinstance(module, NormWithStatistics | nn.GroupNorm | nn.LayerNorm):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and not isinstance(module, nn.PReLU)


def has_running_statistics(module: nn.Module) -> bool:
    """Check whether the module is a batch norm with statistics of its own, so that it can start as the identity."""
    return isinstance(module, BatchNorm) and module.running_mean is not None


def origin(flow: Dataflow, node: fx.Node, user: fx.Node | None = None) -> Origin:
    """Follow a tensor back to the norm that made it.

    Args:
        flow: the dataflow that the node is part of.
        node: a tensor of shape (N, C, H, W).
        user: a node that takes it; if it was changed in place before, nothing is known.
    """
    unknown = Origin("none", (Source((flow.shape(node) or (0, 0))[1]),))
    if user is not None and flow.is_changed(node, user):
        return unknown
    if not flow.parents.get(node) or any(flow.is_changed(before, node) for before in flow.parents[node]):
        return unknown
    module = flow.traced.module(node)
    if module is not None:
        known = _through_module(str(node.target), module, partial(origin, flow, flow.parents[node][0]), unknown)
    else:
        known = _through_function(flow, node, unknown)
    fits = sum(source.channels for source in known.sources) == unknown.sources[0].channels
    return known if fits else replace(known, sources=unknown.sources)


def _through_module(path: str, module: nn.Module, before: Callable[[], Origin], unknown: Origin) -> Origin:
    if "forward" in vars(module) or _is_patched(type(module)):
        return unknown
    if type(module) is nn.Sequential:
        for name, child in zip(module._modules, module, strict=True):  # one that stands twice, too
            before = partial(_through_module, f"{path}.{name}", child, before, unknown)
        known = before()
    else:
        known = _through_class(path, module, before, unknown)
    # A hook may change what the module puts out.
    return replace(known, fixed_point="none") if has_hooks(module) else known


def _is_patched(cls: type[nn.Module]) -> bool:
    """Check whether somebody's own forward was put on a class of torch's."""
    own, of_forward = cls.__module__, getattr(cls.forward, "__module__", "torch")
    return own.partition(".")[0] == "torch" and of_forward.partition(".")[0] != "torch"


def _through_class(path: str, module: nn.Module, before: Callable[[], Origin], unknown: Origin) -> Origin:
    if is_norm(module):
        return _norm(path, module, unknown)
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is nn.Identity or _is_pool(module) or name in _POOL_CLASSES or _is_pad(module):
        return before()
    if type(module) is nn.ChannelShuffle:
        return replace(before(), sources=unknown.sources)
    if type(module) in _RESCALING or name in _DROP_CLASSES:
        return _rescaled(before(), gates=0)
    if type(module).__module__ == nn.ReLU.__module__:
        fixed = "hardtanh" if _is_plain_hardtanh(module) else _FIXED_POINTS.get(type(module), "none")
        return _activated(before(), fixed, f"module:{path}")
    return unknown


def _is_pad(module: nn.Module) -> bool:
    """Check whether a module of torch's puts zeros, or numbers of the map itself, around it."""
    return type(module).__module__ == nn.ZeroPad2d.__module__ and getattr(module, "value", 0) == 0


def _is_pool(module: nn.Module) -> bool:
    """Check whether a module of torch's keeps a map inside the range it came in; sums of a window do not."""
    if type(module).__module__ != nn.MaxPool2d.__module__ or isinstance(module, _SUMS):
        return False
    return getattr(module, "divisor_override", None) is None


def _is_plain_hardtanh(module: nn.Module) -> bool:
    return type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (-1.0, 1.0)


def _norm(path: str, module: nn.Module, unknown: Origin) -> Origin:
    statistics = getattr(module, "running_mean", None) if has_running_statistics(module) else None
    known = unknown if statistics is None else Origin("none", (Source(len(statistics), norm=path),))
    # A norm with an activation inside: its one child that does something.
    inner = [(name, child) for name, child in module.named_children() if not isinstance(child, nn.Identity)]
    if not inner:
        return known
    if len(inner) > 1:
        return unknown
    name, child = inner[0]
    # That the activation comes last is known of timm's.
    is_last = type(module).__module__.partition(".")[0] == "timm"
    fixed = _FIXED_POINTS.get(type(child), "none") if is_last else "none"
    return _activated(known, fixed, f"module:{path}.{name}")


def _through_function(flow: Dataflow, node: fx.Node, unknown: Origin) -> Origin:
    before, target = flow.parents[node][0], node.target
    if target in _FIXED_POINTS:
        return _activated(origin(flow, before), _FIXED_POINTS[target], _function_name(target))
    if (target in _POOLS and not _divides(node)) or target in _CASTS or (target is F.pad and _pads_zeros(node)):
        return origin(flow, before)
    if target in _MOVES:
        return replace(origin(flow, before), sources=unknown.sources)
    if target in (F.dropout, F.dropout2d):
        return _rescaled(origin(flow, before), gates=0)
    if flow.is_activation(node):
        return _activated(origin(flow, before), "none", _function_name(target))
    if target in (torch.cat, torch.concat):
        return _concatenated([origin(flow, part) for part in flow.parents[node]])
    if target in (operator.mul, torch.mul, "mul", "mul_", operator.imul):
        return _gated(flow, node, unknown)
    if target is operator.getitem and flow.shapes.get(before.name) == "tuple":
        return _piece(flow, node, before, unknown)
    return unknown


def _divides(node: fx.Node) -> bool:
    """Check whether an average has a divisor of its own, the last of its seven arguments."""
    return node.kwargs.get("divisor_override") is not None or len(node.args) > 6


def _pads_zeros(node: fx.Node) -> bool:
    """Check the same of `torch.nn.functional.pad`, whose value is the last of four arguments."""
    return next(iter(node.args[3:]), node.kwargs.get("value")) in (None, 0)


def _function_name(target: Any) -> str:
    if isinstance(target, str):
        return f"function:torch.Tensor.{target}"
    name = target.__name__
    return f"function:torch.nn.functional.{name}" if hasattr(F, name) else f"function:torch.{name}"


def _activated(origin: Origin, fixed_point: str, activation: str) -> Origin:
    """Return the origin after an activation; of two in a row only the statistics of the first are known."""
    plain = all(source.activation == "none" and not source.gate for source in origin.sources)
    if not plain:
        return Origin(fixed_point, tuple(Source(source.channels) for source in origin.sources))
    name = "relu" if fixed_point == "relu" else activation
    return Origin(fixed_point, tuple(replace(s, activation=name) if s.norm else s for s in origin.sources))


def _rescaled(origin: Origin, gates: int) -> Origin:
    """Return the origin after a factor that is positive but unbounded or unknown: only a sign survives."""
    fixed = "relu" if origin.fixed_point in ("relu", "relu6") else "none"
    return Origin(fixed, tuple(replace(source, gate=source.gate + gates) for source in origin.sources))


def _gated(flow: Dataflow, node: fx.Node, unknown: Origin) -> Origin:
    factors = [factor for factor in node.args[:2] if isinstance(factor, fx.Node) and factor in flow.parents]
    for gate, x in (factors, factors[::-1]) if len(factors) == 2 else ():
        if _is_gate(flow, gate) and flow.shape(x) == flow.shape(node):
            return _rescaled(origin(flow, x), gates=1)
    return unknown


def _is_gate(flow: Dataflow, node: fx.Node) -> bool:
    while node.target in _RESHAPES and node.op != "call_module":
        node = flow.parents[node][0]
    return type(flow.traced.module(node)) in _GATES or node.target in _GATE_TARGETS


def _concatenated(parts: list[Origin]) -> Origin:
    fixed = {part.fixed_point for part in parts}
    sources = tuple(source for part in parts for source in part.sources)
    return Origin(fixed.pop() if len(fixed) == 1 else "none", sources)


def _piece(flow: Dataflow, node: fx.Node, split: fx.Node, unknown: Origin) -> Origin:
    """One piece of `split` or `chunk` along the channels: its part of the whole map's source."""
    if split.target not in (torch.split, torch.chunk, "split", "chunk") or not flow.parents[split]:
        return unknown
    whole = origin(flow, flow.parents[split][0])
    index, width = node.args[1], unknown.sources[0].channels
    if not isinstance(index, int) or index < 0 or len(whole.sources) != 1:
        return unknown
    pieces = [user for user in split.users if user.target is operator.getitem]
    source = whole.sources[0]
    equal = {(flow.shape(piece) or (0, 0))[1] for piece in pieces} == {width}
    if not equal or (index + 1) * width > source.channels:
        return Origin(whole.fixed_point, unknown.sources)
    return Origin(whole.fixed_point, (replace(source, channels=width, start=source.start + index * width),))
