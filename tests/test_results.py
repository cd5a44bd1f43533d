"""The figures in docs/results and docs/performance.md are those of the runs that lie beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import bench_suite
import compare

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
EXPERIMENTS = ("scratch", "upgrade", "positions", "kernels")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_tables_are_made_from_the_runs(experiment):
    found = json.loads((RESULTS / experiment / "runs.json").read_text())
    shown = (RESULTS / experiment / "table.md").read_text()
    assert compare.table(found) + "\n" == shown
    assert shown in (RESULTS / "README.md").read_text()
    assert (RESULTS / experiment / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_arm_and_every_seed_is_there(experiment):
    found = json.loads((RESULTS / experiment / "runs.json").read_text())
    assert list(found) == [arm.name for arm in compare.EXPERIMENTS[experiment](compare.Options(subset=200))]
    for name, runs in found.items():
        assert [one["options"]["seed"] for one in runs] == list(range(10)), name
        assert all(len(one["epochs"]) == one["recipe"]["epochs"] for one in runs), name
        assert all(one["top1"] == one["epochs"][-1]["top1"] for one in runs), name


def test_the_performance_page_shows_what_was_measured():
    page = (ROOT / "docs" / "performance.md").read_text()
    for title, group in bench_suite.SUITE.items():
        found = {name: json.loads((RESULTS / "performance" / f"{name}.json").read_text()) for name in group}
        for name, setting in group.items():
            measured = found[name]["setting"]
            assert (measured["model"], measured["train"], measured["batch"]) == (
                setting.model,
                setting.train,
                setting.batch,
            )
        assert bench_suite.table(title, found) in page
