"""What would be rewritten, in names and integers only: printable, comparable, JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .text import table
from .values import Norm, Source

WIDE = 0.5


@dataclass(frozen=True)
class Block:
    """One residual block and where its regulator goes.

    Args:
        name: path of the block's module.
        read: path of the module whose input, the map X2 of Eq. (2) and (3), feeds the cell.
        write: path of the module whose input the hidden state is fused into.
        read_width: channels of the map at the read point, N.
        write_width: channels of the map at the write point, M.
        stride: for each spatial axis, how much finer the read grid is than the write grid.
        crop: whether the middle of the subsampled map is taken: a pool rounds down, or code pads.
        dims: number of spatial axes.
        activation: what the fusion applies, see `Fusion`.
        norm: the norm of what is new.
        sources: what is known of the statistics at the write point.
    """

    name: str
    read: str
    write: str
    read_width: int
    write_width: int
    stride: tuple[int, ...]
    crop: bool
    dims: int
    activation: str
    norm: Norm
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Stage:
    """A chain of blocks that share one cell.

    Args:
        name: what `stages=` calls it.
        index: its 0-based place among all stages of the network, in forward order.
        container: path of the smallest module whose call runs all its blocks; empty for the model itself.
        blocks: the blocks, in forward order.
        grid: spatial size at the write points for the plan's input size.
        parameters: new parameters, those of the shared cell included.
        macs: new multiply-adds for one image.
    """

    name: str
    index: int
    container: str
    blocks: tuple[Block, ...]
    grid: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True)
class Skipped:
    """Something that is left as it is: its path, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The dry run of `regulate`.

    Args:
        model: class name of the network.
        options: the cell, kernel, fusion and so on, as `RegulatorConfig.to_dict` writes them.
        input_size: one image, (C, H, W).
        stages: what is regulated.
        skipped: what is not, with the reason.
        base_parameters: parameters of the network without regulators.
        base_macs: its multiply-adds for one image (convolutions and matrix products); None where torch does not tell.
    """

    model: str
    options: dict[str, Any]
    input_size: tuple[int, ...]
    stages: tuple[Stage, ...]
    skipped: tuple[Skipped, ...]
    base_parameters: int
    base_macs: int | None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks that get a regulator, in forward order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def parameters(self) -> int:
        """New parameters."""
        return sum(stage.parameters for stage in self.stages)

    @property
    def macs(self) -> int:
        """New multiply-adds for one image."""
        return sum(stage.macs for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values; `from_dict` reads them back."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_dict`'s result."""
        stages = tuple(stage_from_dict(stage) for stage in values["stages"])
        skipped = tuple(Skipped(**entry) for entry in values["skipped"])
        size, options = tuple(values["input_size"]), dict(values["options"])
        kept = {name: values[name] for name in ("model", "base_parameters", "base_macs")}
        return cls(**kept, options=options, input_size=size, stages=stages, skipped=skipped)

    def __str__(self) -> str:
        return _text(self)

    def warn_if_wide(self) -> None:
        """Warns where the regulators add more than half of the network's parameters or multiply-adds."""
        growth = max(
            self.parameters / max(self.base_parameters, 1), self.macs / self.base_macs if self.base_macs else 0.0
        )
        if growth > WIDE:
            warnings.warn(
                f"regulators add {growth:.0%} to {self.model}: the fusion is a full 1x1 convolution and grows with the "
                "square of a block's inner width, and so does a dense cell; print(plan(model)) shows each stage, and "
                "stages=[...] regulates fewer",
                stacklevel=3,
            )


def stage_from_dict(values: Mapping[str, Any]) -> Stage:
    """Rebuild a stage from its JSON values."""
    blocks = tuple(map(_block_from_dict, values["blocks"]))
    # Plans of 0.1 said "holder", and how its code was to be generated.
    container = values.get("container", values.get("holder"))
    kept = {name: values[name] for name in ("name", "index", "parameters", "macs")}
    return Stage(**kept, container=container, blocks=blocks, grid=tuple(values["grid"]))


def _block_from_dict(values: Mapping[str, Any]) -> Block:
    stride, norm = tuple(values["stride"]), Norm(**values["norm"])
    sources = tuple(Source(**source) for source in values["sources"])
    return Block(**{**values, "stride": stride, "norm": norm, "sources": sources})


def _text(plan: Plan) -> str:
    """Return what `print(plan)` shows: stages, read and write points, growth, and what is left alone."""
    head = [
        f"{plan.model}: {_options(plan)}, input {'x'.join(map(str, plan.input_size))}",
        "",
        *table(
            ("#", "stage", "blocks", "read", "write", "width", "grid", "norm", "params", "MACs"),
            [_row(stage) for stage in plan.stages],
        ),
        "",
        f"new parameters {plan.parameters:,} ({_percent(plan.parameters, plan.base_parameters)} of "
        f"{plan.base_parameters:,}), new multiply-adds {plan.macs / 1e6:,.1f}M {_of_base(plan)}",
    ]
    unit = [b.name for b in plan.blocks if b.norm.kind == "batch" and any(not s.norm for s in b.sources)]
    if unit and plan.options["fusion"] == "paper":
        head.append(f"no norm known before the write point, unit statistics: {_some(unit)}; calibrate() measures them")
    linear = [b.name for b in plan.blocks if b.activation == "none"]
    if linear and plan.options["fusion"] == "paper":
        head.append(f"fused without an activation, none is known to leave their maps as they are: {_some(linear)}")
    if plan.skipped:
        head += ["left alone:", *(f"  {entry.name or plan.model}: {entry.reason}" for entry in plan.skipped)]
    return "\n".join(head)


def _options(plan: Plan) -> str:
    return "{cell} cell, {kernel} kernel, {fusion} fusion, {init} start".format(**plan.options)


def _row(stage: Stage) -> tuple[str, ...]:
    first, last = stage.blocks[0], stage.blocks[-1]
    widths = {first.read_width, first.write_width}
    stride = max(first.stride)
    return (
        str(stage.index),
        stage.name,
        f"{len(stage.blocks)}",
        _point(last.name, last.read) + (f" /{stride}" if stride > 1 else ""),
        _point(last.name, last.write),
        str(first.read_width) if len(widths) == 1 else f"{first.read_width}>{first.write_width}",
        "x".join(map(str, stage.grid)),
        first.norm.kind,
        f"{stage.parameters:,}",
        f"{stage.macs / 1e6:,.1f}M",
    )


def _point(block: str, path: str) -> str:
    return path[len(block) :].lstrip(".")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_base(plan: Plan) -> str:
    if plan.base_macs is None:
        return "(this torch does not count the network's own)"
    return f"({_percent(plan.macs, plan.base_macs)} of {plan.base_macs / 1e6:,.1f}M)"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:+.1%}" if whole else "n/a"
