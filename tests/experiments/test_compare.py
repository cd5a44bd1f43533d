"""Comparisons: the registered arms, the runner, the table, the paired test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare
from experiments import checkpoint, data, networks, plots, registry, runner, tables
from experiments import results as results_of
from experiments.registry import EXPERIMENTS, Arm, Experiment, Job, jobs

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]
CIFAR = data.Data([], [], 10, 3, 32)


def tiny(**arms):
    """An experiment on 64 digits."""
    base = replace(EXPERIMENTS["smoke"].arms[0].options, subset=64, epochs=2)
    made = [Arm("plain", base, kept=True)]
    made += [Arm(name, replace(base, **options)) for name, options in arms.items()]
    return Experiment("tiny", "Tiny", tuple(made), 2)


def folders(root):
    return runner.Folders(root / "work", root / "results")


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=str)
def test_registered_arms_can_be_told_apart_and_started(experiment):
    made = list(jobs([experiment]))
    assert len({job.key for job in made}) == len(made) == len(experiment.arms) * experiment.seeds
    assert set(experiment.references) <= {arm.name for arm in experiment.arms}
    kept = {job.key for other in EXPERIMENTS.values() for job in jobs([other]) if job.arm.kept}
    assert {job.start_key for job in made if job.arm.start} <= kept
    assert len({(arm.options, arm.start) for arm in experiment.arms}) == len(experiment.arms)


def test_the_wide_network_has_as_many_parameters():
    sizes = {
        arm.name: sum(p.numel() for p in networks.build(arm.options, CIFAR).parameters())
        for arm in EXPERIMENTS["scratch"].arms
    }
    assert abs(sizes["plain, width 17"] / sizes["lstm, random"] - 1) < 0.02


def test_arms_differ_in_what_they_are_named_for_alone():
    base = EXPERIMENTS["scratch"].arms[0].options.deciding()
    for arm in EXPERIMENTS["scratch"].arms[1:]:
        other = {key for key, value in arm.options.deciding().items() if value != base[key]}
        assert other <= {"cell", "init", "width", "epochs"}, arm.name


def test_runs_are_made_seed_by_seed():
    order = [job.seed for job in jobs([EXPERIMENTS["scratch"], EXPERIMENTS["retrofit"]])]
    assert order == sorted(order)
    assert [job.seed for job in jobs([EXPERIMENTS["scratch"]], seeds=1)] == [0] * 6


def test_a_comparison_from_run_to_page(tmp_path, monkeypatch, capfd):
    experiment = tiny(lstm={"cell": "lstm"})
    retrofit = Arm("lstm, retrofit", replace(experiment.arms[1].options, epochs=1), "tiny/plain")
    experiment = replace(experiment, arms=(*experiment.arms, retrofit))
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    results = tmp_path / "results"
    command = ["run", "tiny", "--work", str(tmp_path / "work"), "--results", str(results), "--jobs", "2"]
    assert compare.main(command) == 0
    found = results_of.read_runs(experiment, results)
    assert [(name, [one["seed"] for one in runs]) for name, runs in found.items()] == [
        (arm.name, [0, 1]) for arm in experiment.arms
    ]
    assert found["lstm, retrofit"][1]["start"]["network"] == "tiny/plain-1"
    assert "tiny/lstm, seed 1: epoch   2 of 2" in capfd.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    assert compare.main(command) == 0, "the second call repeats nothing"
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before
    (results / "README.md").write_text("\n".join(["before", *tables.marks(experiment), "after"]))
    assert compare.main(["tables", "tiny", "--results", str(results)]) == 0
    page = (results / "README.md").read_text()
    assert tables.table(found) in page
    assert "6 of 6 registered runs are in. 2 comparisons" in page
    assert page.startswith("before") and page.endswith("after")
    assert len(np.unique(imread(results / "tiny" / "plot.png")[..., :3].reshape(-1, 3), axis=0)) > 20


def test_a_runner_that_was_stopped_goes_on_to_the_same_numbers(tmp_path):
    def numbers(root):
        report = json.loads((root / "results" / "smoke" / "plain-0.json").read_text())
        return [{k: v for k, v in entry.items() if not k.endswith("seconds")} for entry in report["epochs"]]

    def command(name):
        paths = ["--work", str(tmp_path / name / "work"), "--results", str(tmp_path / name / "results")]
        return [sys.executable, "-W", "ignore", "examples/compare.py", "run", "smoke", "--seeds", "1", *paths]

    with subprocess.Popen(command("parts"), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while "epoch   2" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.wait()
        assert process.returncode == 143
        time.sleep(0.5)
        assert process.stdout.read().count("epoch") <= 2, "what it had started goes on alone"
    assert not (tmp_path / "parts" / "results").exists()
    job = next(jobs([EXPERIMENTS["smoke"]]))
    for name in ("parts", "whole"):
        runner.run(job, folders(tmp_path / name))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_a_run_that_fails_is_one_line_and_the_others_go_on(tmp_path, capfd):
    experiment = tiny(wild={"rate": 1e9}, lstm={"cell": "lstm"})
    left = runner.run_all(jobs([experiment], seeds=1), folders(tmp_path))
    assert [job.arm.name for job in left] == ["wild"]
    said = capfd.readouterr().err
    assert "tiny/wild, seed 0: the loss is" in said or "tiny/wild, seed 0: what the network says" in said
    assert "Traceback" not in said
    made = ["lstm-0.json", "plain-0.json", "wild-0.failed.json"]
    assert sorted(path.name for path in tmp_path.glob("results/tiny/*.json")) == made
    assert (tmp_path / "work" / "tiny" / "wild-0" / "checkpoint.pt").exists()
    assert "2 of 6 registered runs are in" in tables.block(experiment, tmp_path / "results")
    assert "Failed: wild, seed 0 (" in tables.block(experiment, tmp_path / "results")
    assert runner.run_all(jobs([experiment], seeds=1), folders(tmp_path)) == [], "it is not tried again"


def test_a_result_that_came_meanwhile_stays(tmp_path):
    job = next(jobs([tiny()]))
    runner.run(job, folders(tmp_path))
    before = (tmp_path / "results" / "tiny" / "plain-0.json").read_bytes()
    elsewhere = runner.Folders(tmp_path / "other", tmp_path / "results")
    with pytest.raises(RuntimeError, match="another runner meanwhile, and stays"):
        runner.run(job, elsewhere)
    runner._work(job, runner.Folders(tmp_path / "third", tmp_path / "results"), None)
    assert not (tmp_path / "third" / "tiny" / "plain-0" / "checkpoint.pt").exists()
    assert (tmp_path / "results" / "tiny" / "plain-0.json").read_bytes() == before


def test_two_runners_do_not_share_a_run(tmp_path, capfd):
    experiment, where = tiny(), folders(tmp_path)
    job = next(jobs([experiment]))
    with checkpoint.alone(where.work / job.key):
        assert runner.run_all([job], where) == [job]
        assert "another process trains" in capfd.readouterr().err
    runner.run(job, where)
    assert runner.run_all([job], where) == []


def test_what_another_runner_finished_has_not_failed(tmp_path, monkeypatch):
    job, where = next(jobs([tiny()])), folders(tmp_path)
    begun = runner._begun

    def late(job, folders, device):
        process = begun(job, folders, device)
        process.join()
        folders.result(job).parent.mkdir(parents=True, exist_ok=True)
        folders.result(job).touch()
        return process

    monkeypatch.setattr(runner, "_begun", late)
    with checkpoint.alone(where.work / job.key):
        assert runner.run_all([job], where) == []


def test_a_run_of_other_options_is_not_gone_on_with(tmp_path):
    for rate, alike in ((0.1, True), (0.2, False)):
        job = Job(tiny(), Arm("plain", replace(tiny().arms[0].options, rate=rate)), 0)
        if alike:
            runner.run(job, folders(tmp_path))
        else:
            with pytest.raises(RuntimeError, match="other rate"):
                runner.run(job, folders(tmp_path))


def test_what_starts_from_a_missing_network_says_so(tmp_path, capfd):
    experiment = Experiment("tiny", "", (Arm("lstm", tiny().arms[0].options, "other/plain"),), 1)
    assert len(runner.run_all(jobs([experiment]), folders(tmp_path))) == 1
    assert "other/plain-0.safetensors, which does not come" in capfd.readouterr().err


def reports(*values):
    return [
        {"top1": value, "options": {"seed": seed}, "parameters": 1, "seconds": 2, "machine": {"device": "cuda"}}
        for seed, value in enumerate(values)
    ]


def test_the_paired_test_is_scipys():
    from scipy.stats import ttest_rel

    a, b = [91.0, 93.0, 92.5, 94.0], [90.0, 92.5, 92.75, 92.0]
    found, expected = tables.difference(reports(*a), reports(*b)), ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (found.better, found.pairs) == (3, 4)
    assert (found.mean, found.p) == pytest.approx((0.8125, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_pairs_are_of_the_same_seed():
    found = tables.difference(reports(1, 2, 3)[1:], reports(5, 5))
    assert (found.mean, found.pairs, found.low) == (-3, 1, None)
    assert tables.difference(reports(1, 2)[:1], reports(1, 2)[1:]) is None


def test_equal_differences_are_equal_whatever_the_type():
    """21, 24 and 26 of 30 images right, and one less: in float32 the differences are not the same."""
    a, b = ([float(np.float32(100 * n / 30)) for n in right] for right in ((21, 24, 26), (20, 23, 25)))
    assert len({x - y for x, y in zip(a, b, strict=True)}) > 1
    found = tables.difference(reports(*a), reports(*b))
    assert (found.low, found.p, found.better) == (None, None, 3)


def test_seeds_that_share_a_start_are_one_trial():
    from scipy.stats import ttest_1samp

    a, b = (1, 2, 3, 5, 6, 8, 4), (0,) * 7
    found, expected = tables.difference(reports(*a), reports(*b), starts=3), ttest_1samp([10 / 3, 4, 5.5], 0)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert (found.better, found.pairs) == (7, 7)
    assert EXPERIMENTS["transfer-1000"].starts == 3
    assert EXPERIMENTS["scratch"].starts == 0


def test_a_seed_that_is_missing_is_shown():
    shown = tables.table({"plain": reports(1, 2, 3), "lstm": [reports(1, 2, 3)[1]]})
    assert "| 1.00, 2.00, 3.00 |" in shown
    assert "| -, 2.00, - |" in shown


def test_the_same_runs_are_the_same_picture(tmp_path):
    runs = {"plain": [one | {"epochs": [{"top1": one["top1"]}]} for one in reports(1, 2)]}
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plots.draw(runs, tmp_path / name / "plot.png", "Title", "plain")
        drawn.append((tmp_path / name / "plot.svg").read_bytes())
    assert drawn[0] == drawn[1]


def test_an_unknown_experiment_is_one_line(tmp_path, capsys):
    assert compare.main(["run", "nosuch", "--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("option", [("--jobs", "0"), ("--jobs", "-1"), ("--seeds", "0")])
def test_numbers_of_runs_are_counts(option, capsys):
    with pytest.raises(SystemExit):
        compare.main(["run", "smoke", *option])
    assert "takes 1 or more" in capsys.readouterr().err


def test_tables_without_runs_or_places_say_so(tmp_path, capsys):
    assert compare.main(["tables", "smoke", "--results", str(tmp_path)]) == 0
    assert "`compare.py run smoke` makes them" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("nothing")
    assert compare.main(["tables", "--results", str(tmp_path)]) == 2
    assert "has a place for no experiment" in capsys.readouterr().err


def test_a_file_name_says_arm_and_seed():
    assert registry.path_of("retrofit/lstm, paper, frozen", 2) == "retrofit/lstm-paper-frozen-2"
