"""The JSON files of finished runs, each checked against what is registered under its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .options import Options
from .record import digest
from .registry import Experiment, Job, jobs

Report = Mapping[str, Any]
Runs = Mapping[str, Sequence[Report]]
# What tables and pictures are made from.
_NUMBER = (int, float)
_FIGURES = {"top1": _NUMBER, "epochs": list, "seconds": _NUMBER, "parameters": int, "machine": dict, "recipe": dict}


def read_runs(experiment: Experiment, results: Path) -> dict[str, list[Report]]:
    """Return the finished runs of each arm that has one, by seed.

    Raises:
        ValueError: a file is damaged, or of another run than its name says.
    """
    found: dict[str, list[Report]] = {arm.name: [] for arm in experiment.arms}
    for job in jobs([experiment]):
        if report := read_run(job, results):
            found[job.arm.name].append(report)
    return {name: runs for name, runs in found.items() if runs}


def read_run(job: Job, results: Path) -> Report | None:
    """Return a finished run, None if it has not finished.

    Raises:
        ValueError: the file is damaged, or of a run with other options, or another start, than those registered.
    """
    path = results / f"{job.key}.json"
    report = _read(job, path, _FIGURES | {"start": dict} if job.start_key else _FIGURES)
    if report is None:
        return None
    if not 0 <= report["top1"] <= 100:
        raise _damaged(path, f"top1 is {report['top1']!r}")
    other = [] if report["recipe"] == json.loads(json.dumps(asdict(job.options.plan()))) else ["recipe"]
    start = results / f"{job.start_key}.safetensors"
    if job.start_key and start.exists() and report["start"].get("sha256") != digest(str(start)):
        other += ["start"]
    if other:
        raise _another(path, other)
    return report


def read_failure(job: Job, results: Path) -> Report | None:
    """Return what is known of a run that diverged, None if it did not.

    Raises:
        ValueError: the file is damaged, or of a run with other options than those that are registered.
    """
    return _read(job, results / f"{job.failed_key}.json", {"error": str})


def _read(job: Job, path: Path, wanted: Mapping[str, Any]) -> Report | None:
    """Return what a file says of a job, None without a file; it must be of this job, and whole."""
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        named = (report["experiment"], report["arm"], report["seed"])
        found = {**_plain(Options()), **report["options"]}  # with what is younger than the run
        if missing := sorted(set(wanted) - report.keys()):
            raise KeyError(missing[0])
        if wrong := sorted(name for name, kind in wanted.items() if not isinstance(report[name], kind)):
            raise TypeError(wrong[0])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, repr(error)) from error
    other = sorted(name for name, value in _plain(job.options).items() if found[name] != value)
    if named != (job.experiment.name, job.arm.name, job.seed) or other:
        raise _another(path, other)
    return report


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no whole result ({reason}); delete it and run the experiment again")


def _another(path: Path, other: Sequence[str]) -> ValueError:
    what = f" (other {', '.join(other)})" if other else ""
    return ValueError(f"{path} is of another run{what}; delete it and run the experiment again")


def _plain(options: Options) -> dict[str, Any]:
    """Return what decides a run's numbers, as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(options.deciding()))
    return found


def failures(experiment: Experiment, results: Path) -> list[str]:
    """Return a line for each run that diverged."""
    found = [(job, read_failure(job, results)) for job in jobs([experiment])]
    return [f"{job.arm.name}, seed {job.seed} ({failure['error']})" for job, failure in found if failure]


def seed_of(report: Report) -> int:
    """Return the seed of a run."""
    return int(report["options"]["seed"])
