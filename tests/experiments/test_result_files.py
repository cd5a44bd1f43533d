"""A file under a run's name counts only if it is that run, whole, with the options that are registered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare
from experiments import results, runner
from experiments.registry import EXPERIMENTS, jobs

JOB = next(jobs([EXPERIMENTS["smoke"]]))


RECIPE = json.loads(json.dumps(dataclasses.asdict(JOB.options.plan())))
FIGURES = {"top1": 50.0, "epochs": [], "seconds": 1, "parameters": 1, "machine": {"device": "cpu"}, "recipe": RECIPE}


def report(job=JOB, **others):
    asked = others.pop("options", {})
    options = None if asked is None else json.loads(json.dumps(job.options.deciding())) | asked
    return runner._head(job) | FIGURES | {"options": options} | others


def put(folder, text, name="plain-0"):
    (folder / "smoke").mkdir(exist_ok=True)
    (folder / "smoke" / f"{name}.json").write_text(text if isinstance(text, str) else json.dumps(text))


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
        (report(recipe=RECIPE | {"decay": 0.5}), r"another run \(other recipe\)"),
        (report(options=None), "no whole result"),
        (report(top1="88"), "no whole result.*top1"),
        (report(machine=None), "no whole result.*machine"),
        (report(epochs=3), "no whole result.*epochs"),
        (report(top1=math.nan), "no whole result.*top1"),
        (report(top1=8800), "no whole result.*top1"),
        *(({k: v for k, v in report().items() if k != name}, f"no whole result.*{name}") for name in FIGURES),
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


def test_a_run_of_another_start_is_refused(tmp_path):
    job = next(job for job in jobs([EXPERIMENTS["smoke"]]) if job.start_key)
    put(tmp_path, report(job), "lstm-retrofit-0")
    with pytest.raises(ValueError, match=r"no whole result \(KeyError\('start'\)"):
        results.read_run(job, tmp_path)
    put(
        tmp_path,
        report(job, start={"network": job.start_key, "sha256": hashlib.sha256(b"one").hexdigest()}),
        "lstm-retrofit-0",
    )
    start = tmp_path / f"{job.start_key}.safetensors"
    for content, alike in ((None, True), (b"one", True), (b"other", False)):
        if content:
            start.write_bytes(content)
        if alike:
            assert results.read_run(job, tmp_path)
        else:
            with pytest.raises(ValueError, match=r"another run \(other start\)"):
                results.read_run(job, tmp_path)


def test_failures_are_listed_and_are_no_runs(tmp_path, capsys):
    put(tmp_path, report())
    diverged = [job for job in jobs([EXPERIMENTS["smoke"]]) if job.arm.name == "lstm" and job.seed == 1]
    put(tmp_path, report(diverged[0], error="the loss is nan"), "lstm-1.failed")
    assert results.failures(EXPERIMENTS["smoke"], tmp_path) == ["lstm, seed 1 (the loss is nan)"]
    assert list(results.read_runs(EXPERIMENTS["smoke"], tmp_path)) == ["plain"]
    assert runner.run_all(diverged, runner.Folders(tmp_path / "work", tmp_path)) == []
    assert "smoke/lstm, seed 1: the loss is nan, which is its result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{}", report(error="the loss is nan"), report(seed=7, error="the loss is nan")]
)
def test_a_failure_that_is_none_hides_no_run(content, tmp_path):
    (job,) = (job for job in jobs([EXPERIMENTS["smoke"]]) if job.arm.name == "lstm" and job.seed == 1)
    put(tmp_path, content, "lstm-1.failed")
    with pytest.raises(ValueError, match=r"lstm-1\.failed\.json is "):
        runner.run_all([job], runner.Folders(tmp_path / "work", tmp_path))
    with pytest.raises(ValueError, match=r"lstm-1\.failed\.json is "):
        results.failures(EXPERIMENTS["smoke"], tmp_path)
