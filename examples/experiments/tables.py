"""From the JSON files of runs to tables: means, spreads, paired differences, every run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from .registry import Experiment
from .results import Report, Runs, failures, read_runs, seed_of


@dataclass(frozen=True)
class Difference:
    """An arm minus a reference, seed by seed.

    Args:
        mean: of the differences, in points.
        low: of the 95 % interval by Student's t; None where it cannot be told.
        high: likewise.
        p: of the paired t-test, two-sided.
        better: how many seeds are above the reference.
        pairs: how many seeds both have.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    better: int
    pairs: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:+.2f} to {self.high:+.2f})"
        return f"{self.mean:+.2f}{interval}"


def difference(runs: Sequence[Report], reference: Sequence[Report], starts: int = 0) -> Difference | None:
    """Return the paired difference over the seeds that both have; None if there are none.

    Args:
        runs: of an arm.
        reference: of the arm to subtract.
        starts: how many networks the seeds start from in turn, 0 if each has its own. Seeds of one start are no
            independent trials: their mean is one.
    """
    values, base = ({seed_of(one): one["top1"] for one in part} for part in (runs, reference))
    # Accuracies of float32 differ in digits that no number of images has; equal differences must be equal.
    pairs = {seed: round(values[seed] - base[seed], 4) for seed in sorted(values.keys() & base.keys())}
    if not pairs:
        return None
    own = {start: [pair for seed, pair in pairs.items() if seed % starts == start] for start in range(starts)}
    trials = [statistics.mean(part) for part in own.values() if part] if starts else list(pairs.values())
    mean, counts = statistics.mean(trials), (sum(pair > 0 for pair in pairs.values()), len(pairs))
    if len(trials) < 2 or len(set(trials)) == 1:
        return Difference(mean, None, None, None, *counts)
    reach = float(stats.t.ppf(0.975, len(trials) - 1) * stats.sem(trials))
    p = float(stats.ttest_1samp(trials, 0).pvalue)
    return Difference(mean, mean - reach, mean + reach, p, *counts)


def table(runs: Runs, references: Sequence[str] = ("plain",), starts: int = 0) -> str:
    """Return a table in Markdown, one line an arm; `starts` as for `difference`."""
    seeds = sorted({seed_of(one) for arm in runs.values() for one in arm})
    present = [name for name in references if name in runs]
    head = ["network", "parameters", "top-1 (%), mean ± s.d.", "seconds"]
    for name in present:
        head += [f"difference from {name}, 95 % interval", "p", "better"]
    lines = [_row([*head, "every seed"]), _row(["---"] * (len(head) + 1))]
    for name, arm in runs.items():
        values = [one["top1"] for one in arm]
        cells = [name, f"{arm[0]['parameters']:,}", _mean_and_spread(values), f"{_seconds(arm):,.0f}"]
        for reference in present:
            cells += _beside(arm, runs[reference], starts) if name != reference else ["", "", ""]
        by_seed = {seed_of(one): f"{one['top1']:.2f}" for one in arm}
        lines.append(_row([*cells, ", ".join(by_seed.get(seed, "-") for seed in seeds)]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _seconds(arm: Sequence[Report]) -> float:
    """Of training, of the processor where it did the work: a machine that others use does not change that much."""
    kind = "processor_seconds" if arm[0]["machine"].get("device") == "cpu" else "seconds"
    return statistics.mean(one.get(kind, one["seconds"]) for one in arm)


def _beside(arm: Sequence[Report], reference: Sequence[Report], starts: int) -> list[str]:
    found = difference(arm, reference, starts)
    if found is None:
        return ["", "", ""]
    p = "" if found.p is None else f"{found.p:.3f}" if found.p >= 0.0005 else "< 0.001"
    return [str(found), p, f"{found.better} of {found.pairs}"]


def comparisons(runs: Runs, references: Sequence[str]) -> int:
    """Return how many differences a table shows."""
    return sum(name != reference for reference in references if reference in runs for name in runs)


def block(experiment: Experiment, results: Path) -> str:
    """Return what the page of results shows of an experiment: how much of it is in, the table, the picture."""
    runs = read_runs(experiment, results)
    there, all_ = sum(map(len, runs.values())), len(experiment.arms) * experiment.seeds
    lines = [f"{there} of {all_} registered runs are in."]
    if runs:
        count = comparisons(runs, experiment.references)
        lines[0] += f" {count} comparison{'s' * (count != 1)}; p is not corrected for their number."
        if experiment.starts:
            lines[0] += f" Interval and p are of the means of seeds with the same start, {experiment.starts} at most."
        lines += [
            "",
            table(runs, experiment.references, experiment.starts),
            "",
            f"![every run]({experiment.name}/plot.png)",
        ]
    if failed := failures(experiment, results):
        lines += ["", f"Failed: {'; '.join(failed)}."]
    return "\n".join(lines)


def marks(experiment: Experiment) -> tuple[str, str]:
    """Return the comments between which the page shows an experiment."""
    return f"<!-- {experiment.name}: made by compare.py tables -->", f"<!-- end of {experiment.name} -->"


def renewed(page: str, experiment: Experiment, results: Path) -> str:
    """Return the page with an experiment's block as its runs make it.

    Raises:
        ValueError: the page has no place for it.
    """
    begin, end = marks(experiment)
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the page has no place for {experiment.name}; put in {begin!r} and {end!r}")
    return f"{before}{begin}\n{block(experiment, results)}\n{end}{after}"
