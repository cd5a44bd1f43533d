"""Upgrades a trained network with one line, and fine-tunes it beside a control.

Without arguments: a CIFAR-style ResNet-20 on the handwritten digits that ship with scikit-learn, no network
and no GPU needed. With `--model resnet50.a1_in1k --pretrained --data DIR`: a timm backbone on an image
folder with DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (`validation` and `test` will do as well).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from experiments.data import load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import regulate
from regulate.models import cifar_resnet

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    train: Batches
    test: Batches
    classes: int


def digits(batch: int, seed: int) -> Data:
    """scikit-learn's handwritten digits."""
    images = load("digits")
    order = torch.Generator().manual_seed(seed)
    return Data(
        DataLoader(
            TensorDataset(images.train.pixels, images.train.labels),
            batch,
            shuffle=True,
            drop_last=True,
            generator=order,
        ),
        DataLoader(TensorDataset(images.test.pixels, images.test.labels), 256),
        images.classes,
    )


def folder(directory: str, name: str, batch: int, workers: int) -> Data:
    """An image folder through timm's own datasets, transforms and loaders."""
    import timm
    from timm.data import create_dataset, create_loader, resolve_data_config

    config = resolve_data_config({}, model=timm.create_model(name))
    loaders = []
    for split in ("train", "validation"):
        data = create_dataset("", root=directory, split=split)
        loaders.append(
            create_loader(
                data,
                input_size=config["input_size"],
                batch_size=batch,
                is_training=split == "train",
                mean=config["mean"],
                std=config["std"],
                interpolation=config["interpolation"],
                num_workers=workers,
                use_prefetcher=False,
                persistent_workers=workers > 0,
            )
        )
    return Data(loaders[0], loaders[1], len(data.reader.class_to_idx))


def train(model: nn.Module, data: Data, epochs: int, rate: float, device: torch.device, label: str) -> list[float]:
    """Cosine-decayed SGD. Returns the test accuracy in per cent after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    for epoch in range(epochs):
        model.train()
        bar = tqdm(data.train, desc=f"{label} {epoch + 1}/{epochs}", leave=False, file=sys.stdout, mininterval=0.5)
        for x, y in bar:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        schedule.step()
        found, truth = predictions(model, data, device)
        curve.append(100 * (found == truth).float().mean().item())
    return curve


@torch.no_grad()
def predictions(model: nn.Module, data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of the test images."""
    model.eval()
    pairs = [(model(x.to(device)).argmax(1).cpu(), y) for x, y in data.test]
    return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])


def draw_curves(path: Path, before: list[float], curves: dict[str, list[float]]) -> None:
    figure, (whole, close) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    start = len(before)
    whole.plot(range(1, start + 1), before, color="grey", label="training")
    for (label, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
        for axis in (whole, close):
            axis.plot(range(start, start + len(curve) + 1), [before[-1], *curve], style, label=label)
    for axis, title in ((whole, "Training and fine-tuning"), (close, "Fine-tuning alone")):
        axis.axvline(start, color="lightgrey", linewidth=1)
        axis.set(xlabel="epoch", ylabel="test accuracy (%)", title=title)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a timm name; without it the CIFAR-style ResNet-20")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--data", help="an image folder; without it scikit-learn's digits")
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    parser.add_argument("--epochs", type=int, default=6, help="of training before the upgrade")
    parser.add_argument("--finetune-epochs", type=int, default=4, help="of fine-tuning, for both networks")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate; fine-tuning takes a tenth")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"), help="folder for the figure")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together: a timm name and the image folder to fine-tune it on")
    if args.data and not (Path(args.data) / "train").is_dir():
        parser.error(f"no folder {args.data}/train; --data takes a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    return args


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    if not args.model:
        return cifar_resnet(20, in_channels=1), digits(args.batch, args.seed)
    import timm

    data = folder(args.data, args.model, args.batch, args.workers)
    return timm.create_model(args.model, pretrained=args.pretrained, num_classes=data.classes), data


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = prepare(args)
    model.to(device)
    before = train(model, data, args.epochs, args.rate, device, "training")

    upgraded = regulate.regulate(model, cell=args.cell, seed=args.seed)
    print(regulate.plan(model, cell=args.cell, input_size=next(iter(data.test))[0].shape[1:]), end="\n\n")
    old, truth = predictions(model, data, device)
    new, _ = predictions(upgraded, data, device)
    print(f"predictions that the upgrade changed: {(old != new).sum().item()} of {len(truth)}\n")

    results, curves = [], {}
    for label, network in (("regulated", upgraded), ("plain", copy.deepcopy(model))):
        torch.manual_seed(args.seed)
        if isinstance(data.train, DataLoader) and data.train.generator is not None:
            data.train.generator.manual_seed(args.seed)
        began = time.perf_counter()
        curves[label] = train(network, data, args.finetune_epochs, args.rate / 10, device, f"fine-tuning {label}")
        size = sum(p.numel() for p in network.parameters())
        results.append((label, size, before[-1], curves[label][-1], time.perf_counter() - began))
    print(f"{'network':<10} {'parameters':>11} {'before':>8} {'after':>8} {'seconds':>8}")
    for label, size, first, last, seconds in results:
        print(f"{label:<10} {size:>11,} {first:>7.2f}% {last:>7.2f}% {seconds:>8.1f}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw_curves(args.out / "curves.png", before, curves)
    print(f"\ncurves: {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()
