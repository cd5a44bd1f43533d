"""Upgrades a trained network with one line, and fine-tunes it beside a control; says whether the difference is chance.

Without arguments: a CIFAR-style ResNet-20 on the handwritten digits that ship with scikit-learn, no network
and no GPU needed. With `--model resnet50.a1_in1k --pretrained --data DIR`: a timm backbone on an image
folder with DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (`validation` and `test` will do as well).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from experiments import batches
from experiments.data import Data
from experiments.loop import Job, data_of, fit
from experiments.networks import build
from experiments.options import Options
from experiments.place import Place, place
from experiments.tables import Difference, difference
from torch import Tensor, nn

import regulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


@torch.no_grad()
def predictions(model: nn.Module, data: Data, job: Job) -> tuple[Tensor, Tensor]:
    """Return predicted and true classes of the test images."""
    model.eval()
    pairs = [
        (model(job.input(x.to(job.at.device))).argmax(1).cpu(), y.cpu())
        for x, y in batches.testing(data, job.options, job.at)
    ]
    return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])


def trial(args: argparse.Namespace, seed: int, at: Place) -> Trial:
    """Train, upgrade, and fine-tune both networks with one seed."""
    folder = args.out / f"seed-{seed}"
    options = Options(
        dataset="imagefolder" if args.data else "digits",
        data=args.data,
        subset=args.subset,
        size=args.size,
        model=f"timm/{args.model}" if args.model else "resnet20",
        pretrained=args.pretrained,
        recipe="upgrade",
        epochs=args.epochs,
        rate=args.rate,
        batch=args.batch,
        workers=args.workers,
        seed=seed,
        name=f"seed {seed}, training",
    )
    job = Job(options, options.plan(), at, folder / "trained")
    data = data_of(options)
    model = build(options, data).to(at.device)
    before = [entry["top1"] for entry in fit(model, data, job).history]

    upgraded = regulate.regulate(model, cell=args.cell, seed=seed)
    if seed == 0:
        print(f"\n{regulate.plan(model, cell=args.cell, input_size=(data.channels, data.size, data.size))}\n")
    old, truth = predictions(model, data, job)
    new, _ = predictions(upgraded, data, job)
    print(f"predictions that the upgrade changed: {(old != new).sum().item()} of {len(truth)}\n", flush=True)
    return fine_tuned(dict(zip(NETWORKS, (upgraded, copy.deepcopy(model)), strict=True)), data, job, args, before)


def fine_tuned(
    networks: dict[str, nn.Module], data: Data, job: Job, args: argparse.Namespace, before: list[float]
) -> Trial:
    """Train both networks on with the same images in the same order."""
    curves, seconds, right = {}, {}, {}
    for name, network in networks.items():
        cell = args.cell if name == "regulated" else "none"
        said = f"seed {job.options.seed}, {name}"
        options = replace(job.options, cell=cell, epochs=args.finetune_epochs, rate=args.rate / 10, name=said)
        tuned = Job(options, options.plan(), job.at, job.out.parent / name)
        history = fit(network, data, tuned).history
        curves[name] = [entry["top1"] for entry in history]
        seconds[name] = sum(entry["seconds"] for entry in history)
        found, truth = predictions(network, data, tuned)
        right[name] = found == truth
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return Trial(job.options.seed, before, curves, seconds, sizes, right)


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
    gained, lost = (
        ", ".join(str((one.right[a] & ~one.right[b]).sum().item()) for one in trials)
        for a, b in (NETWORKS, NETWORKS[::-1])
    )
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
        lines.append(f"{name:<10} {trials[0].parameters[name]:>11,} {before:>7.2f}% {after:>7.2f}% {seconds:>8.1f}")
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a timm name; without it the CIFAR-style ResNet-20")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--data", help="an image folder; without it scikit-learn's digits")
    parser.add_argument("--size", type=int, default=224, help="of the images of a folder, in pixels")
    parser.add_argument("--subset", type=int, help="train on so many images, balanced over the classes")
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    parser.add_argument("--epochs", type=int, default=6, help="of training before the upgrade")
    parser.add_argument("--finetune-epochs", type=int, default=4, help="of fine-tuning, for both networks")
    parser.add_argument("--rate", type=float, default=0.1, help="peak learning rate; fine-tuning takes a tenth")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="how often all of it is done")
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"), help="folder for figure and checkpoints")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together: a timm name and the image folder to fine-tune it on")
    if min(args.seeds, args.epochs, args.finetune_epochs) < 1:
        parser.error("--seeds, --epochs and --finetune-epochs take 1 or more")
    return args


def main() -> int:
    args = arguments()
    try:
        with place(None) as at:
            trials = [trial(args, seed, at) for seed in range(args.seeds)]
    except (regulate.RegulateError, ValueError, RuntimeError, OSError) as error:
        print(f"upgrade_backbone.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    draw(args.out / "curves.png", trials)
    print(f"\n{summary(trials)}\n\n{verdict(trials)}\n\ncurves: {args.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
