"""What the demo makes of its trials: whether the difference is more than chance, a table, a picture, a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .checkpoint import written
from .tables import Difference, difference

NETWORKS = ("regulated", "plain")


@dataclass(frozen=True)
class Trial:
    """What one seed gave: `before` the upgrade, and of each of `NETWORKS`.

    Args:
        seed: of the trial.
        before: test accuracy after each epoch of training, in per cent.
        curves: the same of fine-tuning.
        seconds: of fine-tuning, without each epoch's first step.
        parameters: of the network.
        right: which test images it has right in the end.
    """

    seed: int
    before: list[float]
    curves: dict[str, list[float]]
    seconds: dict[str, float]
    parameters: dict[str, int]
    right: dict[str, Tensor]

    def alone(self, name: str) -> int:
        """Return how many test images this network alone has right."""
        (other,) = {*NETWORKS} - {name}
        return int((self.right[name] & ~self.right[other]).sum().item())


def compared(trials: Sequence[Trial]) -> Difference:
    """Return regulated minus plain, seed by seed."""
    reports = {
        name: [{"options": {"seed": one.seed}, "top1": one.curves[name][-1]} for one in trials] for name in NETWORKS
    }
    found = difference(reports["regulated"], reports["plain"])
    assert found is not None, "both were trained with every seed"
    return found


def verdict(trials: Sequence[Trial]) -> str:
    """Return in words whether the difference is more than chance."""
    found = compared(trials)
    count = len(trials[0].right["plain"])
    gained, lost = (", ".join(str(one.alone(name)) for one in trials) for name in NETWORKS)
    images = f"Of {count} test images, regulated alone has {gained} right, plain alone {lost}"
    images += " (a number for each seed)." if len(trials) > 1 else "."
    points = f"Regulated minus plain: {found.mean:+.2f} points"
    if found.pairs < 2:
        return f"{points}; one seed cannot be told from chance, give --seeds 3. {images}"
    if found.low is None or found.high is None:
        return f"{points} with each of {found.pairs} seeds. {images}"
    word = "more than chance" if found.low > 0 or found.high < 0 else "no more than chance"
    return f"{points}, 95 % interval {found.low:+.2f} to {found.high:+.2f} over {found.pairs} seeds: {word}. {images}"


def summary(trials: Sequence[Trial]) -> str:
    """Return the figures as a table, means over the seeds."""
    lines = [f"{'network':<10} {'parameters':>11} {'before':>8} {'after':>8} {'seconds':>8}"]
    before = statistics.mean(one.before[-1] for one in trials)
    for name in NETWORKS:
        after = statistics.mean(one.curves[name][-1] for one in trials)
        seconds = statistics.mean(one.seconds[name] for one in trials)
        spent = f"{seconds:.1f}" if seconds else "-"  # an epoch of a single step has none
        lines.append(f"{name:<10} {trials[0].parameters[name]:>11,} {before:>7.2f}% {after:>7.2f}% {spent:>8}")
    return "\n".join(lines)


def draw(path: Path, trials: Sequence[Trial]) -> None:
    """Draw the curves of every seed, and the differences with their interval."""
    figure, (whole, differences) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for one in trials:
        start = len(one.before)
        whole.plot(range(1, start + 1), one.before, color="grey", label="training" if one is trials[0] else None)
        for name, style in zip(NETWORKS, ("C0o-", "C1s--"), strict=True):
            curve = [one.before[-1], *one.curves[name]]
            whole.plot(
                range(start, start + len(curve)), curve, style, alpha=0.6, label=name if one is trials[0] else None
            )
    whole.set(xlabel="epoch", ylabel="test accuracy (%)", title="Every seed")
    whole.legend()
    found = compared(trials)
    pairs = [one.curves["regulated"][-1] - one.curves["plain"][-1] for one in trials]
    differences.axhline(0, color="grey", linewidth=1)
    differences.plot([one.seed for one in trials], pairs, "o", label="each seed")
    reach = None if found.low is None or found.high is None else (found.high - found.low) / 2
    label = "mean" if reach is None else "mean, 95 % interval"
    differences.errorbar([len(trials)], [found.mean], yerr=reach, fmt="ks", capsize=5, label=label)
    # An axis as narrow as an image would make much of nothing.
    widest = max(1.0, *(abs(value) for value in differences.get_ylim()))
    differences.set(
        xticks=range(len(trials) + 1), xticklabels=[*(str(one.seed) for one in trials), "all"], ylim=(-widest, widest),
        xlabel="seed", ylabel="points", title="Test accuracy, regulated minus plain",
    )  # fmt: skip
    differences.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(path: Path, trials: Sequence[Trial], asked: dict[str, Any]) -> None:
    """Write what the trials gave, so that the figures can be computed again."""
    found = [
        {
            "seed": one.seed,
            "before": one.before,
            **{name: one.curves[name] for name in NETWORKS},
            "seconds": one.seconds,
            "parameters": one.parameters,
            "test images": len(one.right["plain"]),
            "right alone": {name: one.alone(name) for name in NETWORKS},
        }
        for one in trials
    ]
    with written(path) as temporary:
        temporary.write_text(json.dumps({"asked": asked, "trials": found}, indent=1) + "\n")
