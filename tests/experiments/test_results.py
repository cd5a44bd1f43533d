"""The figures in docs/results and docs/performance.md are those of the runs that lie beside them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_ablations
import bench_limits
import bench_memory
import bench_suite
from experiments import results, tables
from experiments.registry import EXPERIMENTS, jobs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGE = (RESULTS / "README.md").read_text()
REGISTERED = [name for name in EXPERIMENTS if f"<!-- {name}:" in PAGE]
DIGITS = ("scratch", "upgrade", "positions", "kernels")


@pytest.mark.parametrize("name", REGISTERED)
def test_the_tables_are_made_from_the_runs(name):
    assert tables.renewed(PAGE, EXPERIMENTS[name], RESULTS) == PAGE
    runs = results.read_runs(EXPERIMENTS[name], RESULTS)
    assert not runs or (RESULTS / name / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", REGISTERED)
def test_every_run_is_whole_and_one_that_was_registered(name):
    expected = {RESULTS / f"{key}.json" for job in jobs([EXPERIMENTS[name]]) for key in (job.key, job.failed_key)}
    assert set((RESULTS / name).glob("*.json")) <= expected
    commits = {}
    for runs in results.read_runs(EXPERIMENTS[name], RESULTS).values():
        for report in runs:
            assert len(report["epochs"]) == report["recipe"]["epochs"]
            assert report["top1"] == report["epochs"][-1]["top1"]
            assert re.fullmatch("[0-9a-f]{12}", report["commit"]), "the code of a run is a commit"
            parts = [report["commit"], *(part["commit"] for part in report.get("later", []))]
            commits.setdefault(report["seed"], set()).update(parts)
    assert all(len(found) == 1 for found in commits.values()), "all arms of one seed are compared on the same code"


@pytest.mark.parametrize("page", [PAGE.partition("## Registered")[0], (ROOT / "README.md").read_text()])
def test_the_sentences_are_those_of_the_tables(page):
    runs = results.read_runs(EXPERIMENTS["scratch"], RESULTS)
    plain, lstm = runs["plain"], runs["lstm, random"]
    found = tables.difference(lstm, plain)
    assert len(plain) == len(lstm) == found.pairs == 3
    flat = " ".join(page.split())
    assert f"{found.mean:+.2f} points from" in flat and f"{found.low:+.2f} to {found.high:+.2f}" in flat
    assert ("no more than chance" in flat) == (found.low < 0 < found.high)
    assert f"{tables._seconds(lstm) / tables._seconds(plain):.1f} times" in flat
    if "more parameters" in flat:
        assert f"{100 * lstm[0]['parameters'] / plain[0]['parameters'] - 100:.0f} % more parameters" in flat


@pytest.mark.parametrize(
    ("name", "arm", "reference", "chance"),
    [
        ("scratch", "lstm, identity", "plain", True),
        ("retrofit", "lstm, paper", "plain", True),
        ("retrofit", "lstm, paper", "plain, 9 epochs", False),
        ("retrofit", "lstm, residual", "plain", True),
        ("retrofit", "gru, paper", "plain", True),
        ("retrofit", "gru, residual", "plain", True),
        ("retrofit", "lstm, paper, frozen", "plain", False),
        ("retrofit", "gru, paper, frozen", "plain", False),
        ("retrofit", "gru, residual, frozen", "plain", False),
        ("transfer-1000", "lstm", "plain", True),
        ("transfer-1000", "lstm in the last stage", "plain", True),
        ("transfer-5000", "lstm", "plain", False),
        ("transfer-5000", "lstm in the last stage", "plain", False),
    ],
)
def test_the_other_sentences_are_too(name, arm, reference, chance):
    runs = results.read_runs(EXPERIMENTS[name], RESULTS)
    found = tables.difference(runs[arm], runs[reference], EXPERIMENTS[name].starts)
    assert found.pairs >= 3 and (found.low < 0 < found.high) == chance
    flat = " ".join(PAGE.partition("## Registered")[0].split())
    assert str(found) in flat
    # The other retrofits stand in one sentence, without p and seconds, which are of several machines.
    is_one_of_many = name == "scratch" or (name == "retrofit" and not arm.startswith("lstm, paper"))
    is_on_the_first_screen = name == "transfer-5000" or (name, arm) == ("transfer-1000", "lstm")
    if is_on_the_first_screen or (name == "retrofit" and "residual" not in arm):
        assert str(found) in " ".join((ROOT / "README.md").read_text().split())
    if not is_one_of_many:
        assert (f"{found}, p = {found.p:.3f}" if name.startswith("transfer") else f"{found.p:.3f}") in flat
    if not is_one_of_many and "frozen" not in arm:
        assert f"{tables._seconds(runs[arm]) / tables._seconds(runs['plain']):.1f} times" in flat


def test_the_sentence_on_all_retrofits():
    runs = results.read_runs(EXPERIMENTS["retrofit"], RESULTS)
    flat = " ".join(PAGE.partition("## Registered")[0].split())
    count = tables.comparisons(runs, EXPERIMENTS["retrofit"].references)
    assert f"All {sum(map(len, runs.values()))} runs are in; the p are not corrected for the table's {count} " in flat
    broken = sorted((run["top1"] for run in runs["lstm, residual, frozen"]), key=lambda top1: top1 > 80)
    assert "ended at {:.2f} % (the others at {:.2f} and {:.2f}; [why](#retrofit))".format(*broken) in flat
    free = [f"{cell}, {fusion}" for cell in ("lstm", "gru") for fusion in ("paper", "residual")]
    apart = [tables.difference(runs[arm], runs["plain"]) for arm in free]
    start = results.read_runs(EXPERIMENTS["scratch"], RESULTS)["plain"]
    gains = [tables.difference(runs[f"{cell}, paper, frozen"], start).mean for cell in ("lstm", "gru")]
    weakest = tables.difference(runs["gru, residual, frozen"], start)
    assert ("which is no more than the network that it started from" in flat) == (weakest.low < 0 < weakest.high)
    assert "though {:.2f} and {:.2f} more than the network".format(*gains) in flat
    assert f"no interval holds a gain above {max(one.high for one in apart):.2f}" in flat
    longer = [tables.difference(runs[arm], runs["plain, 9 epochs"]).mean for arm in free]
    assert f"all four are below it, by {-max(longer):.2f} to {-min(longer):.2f}" in flat


@pytest.mark.parametrize("experiment", DIGITS)
def test_the_tables_of_the_digits_are_made_from_the_runs(experiment):
    folder = RESULTS / "digits" / experiment
    found = json.loads((folder / "runs.json").read_text())
    shown = (folder / "table.md").read_text()
    assert tables.table(found) + "\n" == shown
    assert shown in (RESULTS / "digits" / "README.md").read_text()
    for name, runs in found.items():
        assert [one["options"]["seed"] for one in runs] == list(range(10)), name
        assert all(len(one["epochs"]) == one["recipe"]["epochs"] for one in runs), name


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


def test_the_performance_page_shows_instruction_sets_beside_each_other():
    folders = [RESULTS / "performance" / name for name in ("zen5", "zen5-avx2", "zen3")]
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = bench_suite.beside(folders)
    assert shown in page
    assert len(shown.splitlines()) == 2 + len(list(folders[1].glob("*.json")))
    assert bench_suite.beside(folders[2:]) in page
    assert {path.stem for path in folders[2].glob("*.json")} == {name for g in bench_suite.SUITE.values() for name in g}
    for folder, wanted in zip(folders, ("AVX-512", "AVX2", "AVX2"), strict=True):
        sets = {json.loads(path.read_text())["machine"]["instruction set"] for path in folder.glob("*.json")}
        assert sets == {wanted}


def test_the_performance_page_shows_the_tensors_that_were_counted():
    found = json.loads((RESULTS / "performance" / "tensors.json").read_text())["peak_bytes"]
    assert list(found) == list(bench_memory.NAMES)
    assert bench_memory.table(found) in (ROOT / "docs" / "performance.md").read_text()


def test_the_performance_page_shows_the_limits_and_the_ablations_that_were_measured():
    page = (ROOT / "docs" / "performance.md").read_text()
    for name, instruction_set in (("avx-512", "AVX-512"), ("avx2", "AVX2"), ("avx2-zen3", "AVX2")):
        found = json.loads((RESULTS / "performance" / f"limits-{name}.json").read_text())
        assert found["machine"]["instruction set"] == instruction_set
        assert bench_limits.table(found) in page
    for folder, runs in (
        ("ablations", bench_ablations.RUNS),
        ("ablations", bench_ablations.COMPILED),
        ("zen3/ablations", bench_ablations.RUNS),
    ):
        files = (RESULTS / "performance" / folder / f"{name}.json" for name in runs)
        found = dict(zip(runs, (json.loads(path.read_text()) for path in files), strict=True))
        assert all(one["machine"]["native"] == "on" for one in found.values())
        assert bench_ablations.table(found) in page
