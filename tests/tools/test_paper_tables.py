"""The paper's figures beside ours, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from regulate.tools.cli import main
from regulate.tools.paper import ROWS, Row, count

KNOWN = {
    ("I", "RegNet-20 (GRU, 3x3)"): (324_240, 264_241_152),
    ("I", "RegNet-20 (GRU)"): (37_632, 15_114_240),
    ("III", "ResNet-20"): (272_474, 40_813_184),
    ("V", "RegNet-20(1) (GRU)"): (272_474 + 2_304, None),
    ("V", "RegNet-20(2) (GRU)"): (272_474 + 7_680, None),
    ("V", "RegNet-20(3) (GRU)"): (272_474 + 27_648, None),
    ("VI", "ResNet-50, ImageNet"): (25_557_032, None),
    ("VI", "RegNet-50 (LSTM), ImageNet"): (25_557_032 + 2_576_128, None),
}


@pytest.mark.parametrize(("key", "expected"), KNOWN.items(), ids=lambda value: "-".join(map(str, value)))
def test_counts(key, expected):
    row = next(row for row in ROWS if (row.table, row.name) == key)
    found = count(row)
    assert found.parameters == expected[0]
    assert expected[1] is None or found.flops == expected[1]


def test_every_table_with_figures_is_there():
    assert {row.table for row in ROWS} == {"I", "III", "IV", "V", "VI"}
    assert len({(row.table, row.name) for row in ROWS}) == len(ROWS)
    printed = [row for row in ROWS if row.parameters is not None]
    assert len(printed) == 2 + 12 + 14 + 2


def test_the_command_prints_paper_ours_and_difference(capsys, monkeypatch):
    monkeypatch.setattr("regulate.tools.paper.ROWS", [Row("I", 20, "gru", 44e3, 15e6, increase=True)])
    assert main(["paper"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    figures = ["+44,000", "+37,632", "-6,368", "+15,000,000", "+15,114,240", "+114,240"]
    assert line.split() == ["I", "RegNet-20", "(GRU)", *figures]
