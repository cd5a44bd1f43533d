"""Plans as tables that a person can read."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import Plan, Stage


def plan_table(plan: Plan) -> str:
    """The table that `print(plan)` shows: stages, read and write points, growth, and what is left alone."""
    head = [
        f"{plan.model}: {_options(plan)}, input {'x'.join(map(str, plan.input_size))}",
        "",
        *table(
            ("#", "stage", "blocks", "read", "write", "width", "grid", "norm", "params", "MACs"),
            [_row(stage) for stage in plan.stages],
        ),
        "",
        f"new parameters {plan.parameters:,} ({_percent(plan.parameters, plan.base_parameters)} of "
        f"{plan.base_parameters:,}), new multiply-adds {plan.macs / 1e6:,.1f}M "
        f"({_percent(plan.macs, plan.base_macs)} of {plan.base_macs / 1e6:,.1f}M)",
    ]
    unit = [b.name for b in plan.blocks if b.norm.kind == "batch" and any(not s.norm for s in b.sources)]
    if unit and plan.options["fusion"] == "paper":
        head.append(f"no norm known before the write point, unit statistics: {_some(unit)}; calibrate() measures them")
    linear = [b.name for b in plan.blocks if b.activation == "none"]
    if linear and plan.options["fusion"] == "paper":
        head.append(f"fused without an activation, which would change the function: {_some(linear)}")
    if plan.skipped:
        head += ["left alone:", *(f"  {entry.name or plan.model}: {entry.reason}" for entry in plan.skipped)]
    return "\n".join(head)


def _options(plan: Plan) -> str:
    o = plan.options
    return f"{o['cell']} cell, {o['kernel']} kernel, {o['fusion']} fusion, {o['init']} start"


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


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:+.1%}" if whole else "n/a"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, numbers right-aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, strict=True)
        cells = [cell.rjust(width) if cell[:1] in "0123456789+-" else cell.ljust(width) for cell, width in pairs]
        return "  ".join(cells).rstrip()

    return [line(head), *(line(row) for row in rows)]
