"""Comparisons on two seeds: the arms, the table, the paired test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare
from experiments import data, networks
from experiments.options import Options


@pytest.mark.parametrize("experiment", list(compare.EXPERIMENTS))
def test_the_arms_of_the_experiments(experiment):
    arms = compare.EXPERIMENTS[experiment](Options(subset=200))
    assert len({arm.name for arm in arms}) == len(arms)
    assert "plain" in [arm.name for arm in arms]
    digits = data.load("digits")
    sizes = {arm.name: sum(p.numel() for p in networks.build(arm.options, digits).parameters()) for arm in arms}
    if experiment == "scratch":
        assert abs(sizes["plain, width 17"] / sizes["lstm"] - 1) < 0.02


def test_a_comparison_on_two_seeds(tmp_path, capsys):
    arguments = ["upgrade", "--seeds", "2", "--subset", "64", "--epochs", "2", "--arms", "lstm, identity"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert compare.main(arguments) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| trained", "| plain", "| lstm, identity"]
    found = json.loads((tmp_path / "out" / "runs.json").read_text())
    means = [sum(one["top1"] for one in found[name]) / 2 for name in ("plain", "lstm, identity")]
    assert f"{means[1]:.2f} ±" in rows[2]
    assert f"{means[1] - means[0]:+.2f}" in rows[2]
    assert len(np.unique(imread(tmp_path / "out" / "plot.png")[..., :3].reshape(-1, 3), axis=0)) > 20
    capsys.readouterr()
    before = (tmp_path / "work" / "upgrade" / "plain-0" / "run.json").stat().st_mtime
    assert compare.main(arguments) == 0, "the second call takes the runs of the first"
    assert (tmp_path / "work" / "upgrade" / "plain-0" / "run.json").stat().st_mtime == before


def test_the_paired_test_is_scipys():
    from scipy.stats import ttest_rel

    a, b = [91.0, 93.0, 92.5, 94.0], [90.0, 92.5, 92.75, 92.0]
    difference, p, better = compare._paired(a, b)
    assert difference.startswith("+0.81 (")
    assert p == f"{ttest_rel(a, b).pvalue:.3f}"
    assert better == "3 of 4"


def test_an_unknown_arm_is_one_line(tmp_path, capsys):
    assert compare.main(["scratch", "--arms", "nosuch", "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
