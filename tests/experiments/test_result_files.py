"""A file under a run's name counts only if it is that run, whole, with the options that are registered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare
from experiments import results, runner
from experiments.registry import EXPERIMENTS, jobs

JOB = next(jobs([EXPERIMENTS["smoke"]]))


def report(**others):
    asked = others.pop("options", {})
    options = None if asked is None else json.loads(json.dumps(JOB.options.deciding())) | asked
    return {"experiment": "smoke", "arm": "plain", "seed": 0, "top1": 50.0, "options": options} | others


def put(folder, text):
    (folder / "smoke").mkdir(exist_ok=True)
    (folder / "smoke" / "plain-0.json").write_text(text if isinstance(text, str) else json.dumps(text))


def test_the_registered_run_counts(tmp_path):
    put(tmp_path, report())
    assert results.read_run(JOB, tmp_path)["top1"] == 50
    older = report()
    del older["options"]["compile"], older["options"]["norm"]
    put(tmp_path, older | {"options": older["options"] | {"device": "cpu"}})
    assert results.read_run(JOB, tmp_path), "options that are younger than the run have their defaults"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (report(seed=1), "another run"),
        (report(arm="lstm"), "another run"),
        (report(options={"seed": 1}), r"another run \(other seed\)"),
        (report(options={"epochs": 400, "cell": "gru"}), r"another run \(other cell, epochs\)"),
        (report(options=None), "no whole result"),
        ({}, "no whole result"),
        ("[1]", "no whole result"),
        (json.dumps(report())[:-9], "no whole result"),
        ("", "no whole result"),
    ],
)
def test_anything_else_is_refused_by_name(content, words, tmp_path, capsys):
    put(tmp_path, content)
    with pytest.raises(ValueError, match=rf"plain-0\.json is .*{words}.*run the experiment again"):
        results.read_runs(EXPERIMENTS["smoke"], tmp_path)
    with pytest.raises(ValueError, match=words):
        runner.run_all([JOB], runner.Folders(tmp_path / "work", tmp_path))
    assert compare.main(["tables", "smoke", "--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_failures_are_listed_and_are_no_runs(tmp_path):
    put(tmp_path, report())
    (tmp_path / "smoke" / "lstm-1.failed.json").write_text(json.dumps({"error": "the loss is nan"}))
    assert results.failures(EXPERIMENTS["smoke"], tmp_path) == ["lstm, seed 1 (the loss is nan)"]
    assert list(results.read_runs(EXPERIMENTS["smoke"], tmp_path)) == ["plain"]
