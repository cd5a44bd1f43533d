"""Pictures of experiments: every run, the paired differences, accuracy over the epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .checkpoint import written
from .results import Report, Runs
from .tables import difference


def draw(runs: Runs, path: Path, title: str, reference: str, starts: int = 0) -> None:
    """Draw an experiment's runs to a PNG file, and beside it to an SVG file; `starts` as for `difference`."""
    figure, (points, differences, curves) = plt.subplots(
        1, 3, figsize=(16, 1.5 + 0.45 * max(6, len(runs))), layout="constrained"
    )
    for place, (name, arm) in enumerate(runs.items()):
        _points(points, place, arm)
        if name != reference and reference in runs:
            _difference(differences, place, arm, runs[reference], starts)
        _curve(curves, name, arm)
    for axes in (points, differences):
        axes.set_yticks(range(len(runs)), list(runs) if axes is points else [])
        axes.set_ylim(len(runs) - 0.5, -0.5)
    points.set(xlabel="top-1 accuracy (%): each seed, and the mean", title=title)
    differences.axvline(0, color="grey", linewidth=1)
    differences.set(xlabel=f"difference from {reference}: each seed, and the 95 % interval", title="Seed by seed")
    curves.set(xlabel="epoch", ylabel="top-1 accuracy (%): mean and range of the seeds", title="Over the epochs")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.legend(fontsize="small")
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    # Without a date, and with names that are no random numbers: the same runs are the same file.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}), written(path.with_suffix(".svg")) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


def _points(axes: Axes, place: int, arm: Sequence[Report]) -> None:
    values = [one["top1"] for one in arm]
    axes.plot(values, [place] * len(values), "o", alpha=0.5)
    axes.plot([statistics.mean(values)], [place], "k|", markersize=18)


def _difference(axes: Axes, place: int, arm: Sequence[Report], reference: Sequence[Report], starts: int) -> None:
    for one in arm:
        if pair := difference([one], reference):
            axes.plot([pair.mean], [place], "o", color="C0", alpha=0.5)
    whole = difference(arm, reference, starts)
    if whole and whole.low is not None and whole.high is not None:
        axes.errorbar([whole.mean], [place], xerr=(whole.high - whole.low) / 2, fmt="k|", capsize=4)


def _curve(axes: Axes, name: str, arm: Sequence[Report]) -> None:
    tested = [
        (number, [entry["top1"] for entry in entries])
        for number, entries in enumerate(zip(*(one["epochs"] for one in arm), strict=True), 1)
        if "top1" in entries[0]
    ]
    numbers = [number for number, _ in tested]
    means = [statistics.mean(values) for _, values in tested]
    (line,) = axes.plot(numbers, means, "." if len(tested) == 1 else "-", label=name)
    lowest, highest = ([end(values) for _, values in tested] for end in (min, max))
    axes.fill_between(numbers, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
