"""The parameters and FLOPs that the paper prints, beside those that its architectures have."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from .. import Plan, RegulatorConfig, plan
from ..models.by_name import load_model
from ..models.cifar import cifar_resnet
from ..schema.text import table


@dataclass(frozen=True)
class Row:
    """One line of a table of arXiv 2101.00590.

    Args:
        table: its number.
        depth: of the ResNet; 50 is the ImageNet one, the others are those of Table II.
        cell: the regulator's, or empty for the plain network.
        parameters: what the paper prints, in parameters.
        flops: what the paper prints, in FLOPs.
        increase: whether it prints what is added, which it counts at two FLOPs a multiply-add; totals it
            counts at one.
        kernel: of the cell.
        stage: 0-based, where one stage alone is regulated.
        classes: of the classifier.
        reduction: of squeeze-and-excitation.
    """

    table: str
    depth: int
    cell: str = ""
    parameters: float | None = None
    flops: float | None = None
    increase: bool = False
    kernel: str = "light"
    stage: int | None = None
    classes: int = 10
    reduction: int = 0

    @property
    def name(self) -> str:
        """As the paper calls it."""
        kind = ("SE-" if self.reduction else "") + ("RegNet" if self.cell else "ResNet")
        place = "" if self.stage is None else f"({self.stage + 1})"
        how = f" ({self.cell.upper()}{', 3x3' if self.kernel == 'dense' else ''})" if self.cell else ""
        data = {10: "", 100: ", CIFAR-100", 1000: ", ImageNet"}[self.classes]
        return f"{kind}-{self.depth}{place}{how}{data}"


@dataclass(frozen=True)
class Counted:
    """A row with our figures: parameters, and FLOPs in the row's own unit."""

    row: Row
    parameters: int
    flops: int | None


def _rows() -> list[Row]:
    rows = [
        Row("I", 20, "gru", 330e3, 346e6, increase=True, kernel="dense"),
        Row("I", 20, "gru", 44e3, 15e6, increase=True),
    ]
    rows += [Row("III", 20, cell, reduction=reduction) for reduction in (0, 8) for cell in ("", "rnn", "gru", "lstm")]
    added = {20: (0.04, 0.04, 0.04, 0.04), 32: (0.06, 0.07, 0.07, 0.07), 56: (0.11, 0.12, 0.11, 0.12)}
    rows += [
        Row("IV", depth, cell, printed * 1e6, increase=True, classes=classes)
        for depth, figures in added.items()
        for (classes, cell), printed in zip(product((10, 100), ("gru", "lstm")), figures, strict=True)
    ]
    totals = {
        10: {"gru": (0.279, 0.285, 0.306), "lstm": (0.281, 0.290, 0.325)},
        100: {"gru": (0.285, 0.291, 0.312), "lstm": (0.286, 0.296, 0.331)},
    }
    for classes, plain in ((10, 0.273e6), (100, 0.278e6)):
        rows.append(Row("V", 20, "", plain, classes=classes))
        rows += [
            Row("V", 20, cell, printed * 1e6, stage=stage, classes=classes)
            for cell, figures in totals[classes].items()
            for stage, printed in enumerate(figures)
        ]
    rows += [Row("VI", 50, "", 26.6e6, 4.14e9, classes=1000), Row("VI", 50, "lstm", 31.3e6, 5.12e9, classes=1000)]
    return rows


ROWS = _rows()


def count(row: Row) -> Counted:
    """Build a row's network without weights being touched and counts.

    Args:
        row: the line of the table.

    Raises:
        ModuleNotFoundError: timm, of which ResNet-50 is, is not installed.
    """
    drawn = _plan(row)
    parameters, macs = (drawn.parameters, drawn.macs) if row.cell else (0, 0)
    if row.increase:
        return Counted(row, parameters, 2 * macs)
    flops = None if drawn.base_macs is None else macs + drawn.base_macs
    return Counted(row, parameters + drawn.base_parameters, flops)


def _plan(row: Row) -> Plan:
    if row.depth == 50:
        model, size = load_model("resnet50"), 224
    else:
        model, size = cifar_resnet(row.depth, num_classes=row.classes, reduction=row.reduction), 32
    stages = None if row.stage is None else (row.stage,)
    config = RegulatorConfig(row.cell or "lstm", row.kernel, stages=stages)
    return plan(model, config=config, input_size=size)


def compare() -> str:
    """All rows as a table: the paper's figures, ours, and the difference.

    Examples:
        >>> print(count(ROWS[1]).parameters, count(ROWS[1]).flops)
        37632 15114240
    """
    head = ("table", "network", "paper", "here", "difference", "paper FLOPs", "here", "difference")
    notes = [
        "",
        "Signs are increases over the plain network. FLOPs: increases at two a multiply-add, totals at one, as the",
        "paper counts. ResNets have option B shortcuts (1x1 convolutions); docs/paper.md goes through the differences.",
    ]
    return "\n".join([*table(head, [_line(count(row)) for row in ROWS]), *notes])


def _line(counted: Counted) -> tuple[str, ...]:
    row, sign = counted.row, "+" if counted.row.increase else ""
    parameters = _beside(row.parameters, counted.parameters, sign)
    return (row.table, row.name, *parameters, *_beside(row.flops, counted.flops, sign))


def _beside(printed: float | None, ours: int | None, sign: str) -> tuple[str, str, str]:
    paper = "-" if printed is None else f"{sign}{printed:,.0f}"
    here = "not known" if ours is None else f"{sign}{ours:,}"
    return paper, here, "-" if printed is None or ours is None else f"{ours - printed:+,.0f}"
