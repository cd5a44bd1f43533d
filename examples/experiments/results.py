"""The JSON files of finished runs, each checked against what is registered under its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import Options
from .registry import Experiment, Job, jobs

Report = Mapping[str, Any]
Runs = Mapping[str, Sequence[Report]]


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
        ValueError: the file is damaged, or of a run with other options than those that are registered.
    """
    path = results / f"{job.key}.json"
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        named = (report["experiment"], report["arm"], report["seed"], report["top1"] is None)
        found = {**_plain(Options()), **report["options"]}  # with what is younger than the run
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no whole result ({error!r}); delete it and run the experiment again") from error
    other = sorted(name for name, value in _plain(job.options).items() if found[name] != value)
    if named != (job.experiment.name, job.arm.name, job.seed, False) or other:
        what = f" (other {', '.join(other)})" if other else ""
        raise ValueError(f"{path} is of another run{what}; delete it and run the experiment again")
    return report


def _plain(options: Options) -> dict[str, Any]:
    """Return what decides a run's numbers, as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(options.deciding()))
    return found


def failures(experiment: Experiment, results: Path) -> list[str]:
    """Return a line for each run that diverged."""
    found = [(job, results / f"{job.failed_key}.json") for job in jobs([experiment])]
    return [
        f"{job.arm.name}, seed {job.seed} ({json.loads(path.read_text())['error']})"
        for job, path in found
        if path.exists()
    ]


def seed_of(report: Report) -> int:
    """Return the seed of a run."""
    return int(report["options"]["seed"])
