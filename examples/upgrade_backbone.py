"""Upgrades a trained network with one line, and fine-tunes it beside a control; says whether the difference is chance.

Without arguments: a CIFAR-style ResNet-20 on the handwritten digits that ship with scikit-learn, no network
and no GPU needed. With `--model resnet50.a1_in1k --pretrained --data DIR`: a timm backbone on an image
folder with DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (`validation` and `test` will do as well).
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from experiments import batches, record
from experiments.checkpoint import NAME, Run, alone, keep_what_is_there
from experiments.data import Data
from experiments.loop import data_of, fit
from experiments.messages import EXPECTED, one_line
from experiments.networks import build
from experiments.options import COUNT, Options, at_least
from experiments.place import Place, place
from experiments.steps import DivergedError, Job
from experiments.trials import NETWORKS, Trial, draw, summary, verdict, write
from torch import Tensor, nn

import regulate


@torch.no_grad()
def predictions(model: nn.Module, data: Data, job: Job) -> tuple[Tensor, Tensor]:
    """Return predicted and true classes of the test images."""
    model.eval()
    pairs = [
        (model(job.input(x.to(job.at.device))).argmax(1).cpu(), y.cpu())
        for x, y in batches.testing(data, job.options, job.at)
    ]
    return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])


def fitted(model: nn.Module, data: Data, job: Job, start: str | None = None) -> Run:
    """Train; of a network that diverges the message says which one it is."""
    try:
        return fit(model, data, job, start)
    except DivergedError as error:
        raise DivergedError(f"{job.options.name}: {error}") from error


def begin(args: argparse.Namespace) -> None:
    """Lose no epochs on a user's images; without --resume the digits begin anew, from nothing that was there."""
    for seed in range(args.seeds):
        for name in ("trained", *NETWORKS):
            folder = args.out / f"seed-{seed}" / name
            if args.data:
                keep_what_is_there(folder, args.resume)
            elif not args.resume:
                (folder / NAME).unlink(missing_ok=True)


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
        resume=args.resume,
    )
    job = Job(options, options.plan(), at, folder / "trained")
    data = data_of(options)
    model = build(options, data).to(at.device)
    # Before hours of training: whether this network can be upgraded, at this size.
    size = (data.channels, data.size, data.size)
    planned = regulate.plan(model, cell=args.cell, input_size=size)
    if seed == 0:
        print(f"{planned}\n", flush=True)
    before = [entry["top1"] for entry in fitted(model, data, job).history]

    upgraded = regulate.regulate(model, cell=args.cell, input_size=size, seed=seed)
    old, truth = predictions(model, data, job)
    new, _ = predictions(upgraded, data, job)
    print(f"predictions that the upgrade changed: {(old != new).sum().item()} of {len(truth)}\n", flush=True)
    start = record.digest_of(model.state_dict())
    return fine_tuned(
        dict(zip(NETWORKS, (upgraded, copy.deepcopy(model)), strict=True)), data, job, args, before, start
    )


def fine_tuned(
    networks: dict[str, nn.Module],
    data: Data,
    job: Job,
    args: argparse.Namespace,
    before: list[float],
    start: str,
) -> Trial:
    """Train both networks on with the same images in the same order; `start` is the digest of what both were."""
    curves, seconds, right = {}, {}, {}
    for name, network in networks.items():
        cell = args.cell if name == "regulated" else "none"
        said = f"seed {job.options.seed}, {name}"
        options = replace(job.options, cell=cell, epochs=args.finetune_epochs, rate=args.rate / 10, name=said)
        tuned = Job(options, options.plan(), job.at, job.out.parent / name)
        history = fitted(network, data, tuned, start).history
        curves[name] = [entry["top1"] for entry in history]
        seconds[name] = sum(entry["seconds"] for entry in history)
        found, truth = predictions(network, data, tuned)
        right[name] = found == truth
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return Trial(job.options.seed, before, curves, seconds, sizes, right)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a timm name; without it the CIFAR-style ResNet-20")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--data", help="an image folder; without it scikit-learn's digits")
    parser.add_argument("--size", type=COUNT, default=224, help="of the images of a folder, in pixels")
    parser.add_argument("--subset", type=COUNT, help="train on so many images, balanced over the classes")
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    parser.add_argument("--epochs", type=COUNT, default=6, help="of training before the upgrade")
    parser.add_argument("--finetune-epochs", type=COUNT, default=4, help="of fine-tuning, for both networks")
    parser.add_argument("--rate", type=float, default=0.1, help="peak learning rate; fine-tuning takes a tenth")
    parser.add_argument("--batch", type=COUNT, default=64)
    parser.add_argument("--workers", type=at_least(0), default=0)
    parser.add_argument("--seeds", type=COUNT, default=3, help="how often all of it is done")
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"), help="folder for figures and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier call left in --out")
    args = parser.parse_args()
    if args.pretrained and not args.model:
        parser.error("--pretrained is for timm's networks; give --model and --data")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together: a timm name and the image folder to fine-tune it on")
    return args


def main() -> int:
    args = arguments()
    trials: list[Trial] = []
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    code = 0
    try:
        with place(None) as at, alone(args.out):
            begin(args)
            for seed in range(args.seeds):
                trials.append(trial(args, seed, at))
                write(args.out / "trials.json", trials, asked)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on", file=sys.stderr)
        code = 130
    except EXPECTED as error:
        print(f"upgrade_backbone.py: {one_line(error)}", file=sys.stderr)
        code = 2
    return report(trials, args) or code if trials else code


def report(trials: list[Trial], args: argparse.Namespace) -> int:
    """Say what the finished trials gave. Return 0, 2 if it could not be drawn."""
    print(f"\n{summary(trials)}\n\n{verdict(trials)}\n", flush=True)
    try:
        draw(args.out / "curves.png", trials)
    except OSError as error:
        print(f"upgrade_backbone.py: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"curves: {args.out / 'curves.png'}, figures: {args.out / 'trials.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
