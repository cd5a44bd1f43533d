"""Compares networks on equal terms: the same seeds, data and recipe for each, a paired test, and no result left out.

    python examples/compare.py scratch --seeds 10 --jobs 2 --out docs/results/scratch

An experiment is a list of arms, each an `Options` of options.py. Every arm is trained with every seed; a run that
is there already, from a call before, is not repeated. Written are `runs.json`, `table.md` and `plot.png`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from experiments.loop import train
from experiments.options import Options

import regulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELLS = ("rnn", "gru", "lstm")
# As many parameters as the regulated ResNet-20 to within 2 %: 17 instead of 16 channels.
WIDER = 17


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: its name, what it trains, and the arm whose network it starts from."""

    name: str
    options: Options
    start: str = ""


def scratch(base: Options) -> list[Arm]:
    """From scratch, the paper's Table III: plain, each cell, and a plain network of as many parameters."""
    cells = [Arm(cell, replace(base, cell=cell)) for cell in CELLS]
    return [Arm("plain", base), *cells, Arm(f"plain, width {WIDER}", replace(base, width=WIDER))]


def upgrade(base: Options) -> list[Arm]:
    """A trained network, trained on as it is or regulated, with each of the starts."""
    tuned = replace(base, rate=0.01, epochs=15, milestones=(10,))
    starts = [
        Arm(f"lstm, {init}", replace(tuned, cell="lstm", init=init), "trained")
        for init in ("identity", "unit", "random")
    ]
    return [Arm("trained", base), Arm("plain", tuned, "trained"), *starts]


def positions(base: Options) -> list[Arm]:
    """One stage regulated, the paper's Table V. Its RegNet(i) is stage i - 1 here."""
    arms = [
        Arm(f"{cell} in stage {i}", replace(base, cell=cell, stages=(i,))) for cell in ("gru", "lstm") for i in range(3)
    ]
    return [Arm("plain", base), *arms]


def kernels(base: Options) -> list[Arm]:
    """The light kernel against the dense one, the paper's Table I."""
    arms = [Arm(f"gru, {kernel}", replace(base, cell="gru", kernel=kernel)) for kernel in ("light", "dense")]
    return [Arm("plain", base), *arms]


EXPERIMENTS: dict[str, Callable[[Options], list[Arm]]] = {
    "scratch": scratch,
    "upgrade": upgrade,
    "positions": positions,
    "kernels": kernels,
}


def run(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """One arm with one seed; the result of an earlier call if there is one."""
    out = folder / f"{_slug(arm.name)}-{seed}"
    start = str(folder / f"{_slug(arm.start)}-{seed}" / "model.safetensors") if arm.start else None
    options = replace(arm.options, seed=seed, out=str(out), weights=start, quiet=True)
    done = out / "run.json"
    if done.exists():
        report: dict[str, Any] = json.loads(done.read_text())
        if report["options"] == json.loads(json.dumps(options.deciding())):
            return report
    return train(options)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def results(arms: Sequence[Arm], seeds: int, folder: Path, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """All runs by arm. Arms that start from another one's network come after it."""
    found: dict[str, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for wave in ([arm for arm in arms if not arm.start], [arm for arm in arms if arm.start]):
            waiting = {arm.name: [pool.submit(run, arm, seed, folder) for seed in range(seeds)] for arm in wave}
            for name, futures in waiting.items():
                found[name] = [future.result() for future in futures]
                print(f"{name}: {_mean_and_spread([one['top1'] for one in found[name]])}", flush=True)
    return {arm.name: found[arm.name] for arm in arms}


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def table(found: dict[str, list[dict[str, Any]]], reference: str = "plain") -> str:
    """Means, spreads, and each arm's difference from the reference, seed by seed, with a paired t-test."""
    lines = [
        "| network | parameters | top-1 (%), mean ± s.d. | difference, 95 % interval | p | better |",
        "|---|---|---|---|---|---|",
    ]
    base = [one["top1"] for one in found[reference]]
    for name, runs in found.items():
        values = [one["top1"] for one in runs]
        beside = _paired(values, base) if name != reference else ("", "", "")
        cells = (name, f"{runs[0]['parameters']:,}", _mean_and_spread(values), *beside)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(values: Sequence[float], base: Sequence[float]) -> tuple[str, str, str]:
    from scipy import stats

    differences = [a - b for a, b in zip(values, base, strict=True)]
    better = f"{sum(d > 0 for d in differences)} of {len(differences)}"
    mean = statistics.mean(differences)
    if len(differences) < 2 or len(set(differences)) == 1:
        return f"{mean:+.2f}", "", better
    reach = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return (
        f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})",
        f"{stats.ttest_1samp(differences, 0).pvalue:.3f}",
        better,
    )


def plot(found: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Every run as a point, with the mean; and the mean test accuracy over the epochs."""
    figure, (points, curves) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for place, (name, runs) in enumerate(found.items()):
        values = [one["top1"] for one in runs]
        points.plot(values, [place] * len(values), "o", alpha=0.5)
        points.plot([statistics.mean(values)], [place], "k|", markersize=18)
        per_epoch = zip(*([entry["top1"] for entry in one["epochs"]] for one in runs), strict=True)
        curves.plot([statistics.mean(column) for column in per_epoch], label=name)
    points.set_yticks(range(len(found)), list(found))
    points.invert_yaxis()
    points.set(xlabel="top-1 accuracy (%), one point a seed", title=title)
    curves.set(xlabel="epoch", ylabel="mean top-1 accuracy (%)", title="Over the epochs")
    curves.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiment", choices=tuple(EXPERIMENTS))
    made.add_argument("--seeds", type=int, default=10)
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    made.add_argument("--dataset", default="digits")
    made.add_argument("--data")
    made.add_argument("--subset", type=int, default=None, help="training images; of the digits 200 by default")
    made.add_argument("--model", default="resnet20")
    made.add_argument("--epochs", type=int)
    made.add_argument("--batch", type=int)
    made.add_argument("--arms", nargs="+", help="only these, and plain")
    made.add_argument("--work", type=Path, default=Path("runs/compare"), help="folder of the single runs")
    made.add_argument("--out", type=Path, required=True, help="folder of the results")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a comparison. Returns 0, or 2 for an error, which is one line on stderr."""
    args = parser().parse_args(arguments)
    subset = args.subset or (200 if args.dataset == "digits" else None)
    base = Options(
        dataset=args.dataset, data=args.data, subset=subset, model=args.model, epochs=args.epochs, batch=args.batch
    )
    arms = [
        arm
        for arm in EXPERIMENTS[args.experiment](base)
        if not args.arms or arm.name in {*args.arms, "plain", "trained"}
    ]  # fmt: skip
    names = [arm.name for arm in EXPERIMENTS[args.experiment](base)]
    unknown = sorted(set(args.arms or ()) - set(names))
    if unknown:
        print(f"compare.py: --arms takes {names}, got {unknown}", file=sys.stderr)
        return 2
    try:
        found = results(arms, args.seeds, args.work / args.experiment, args.jobs)
    except (regulate.RegulateError, ValueError, RuntimeError, OSError) as error:
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "runs.json").write_text(json.dumps(found))
    (args.out / "table.md").write_text(table(found) + "\n")
    plot(found, args.out / "plot.png", f"{args.experiment}: {args.model} on {args.dataset}")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
