"""Trains a plain or a regulated network: the paper's experiments, and yours.

    python examples/train.py --dataset digits --model resnet20 --cell gru
    python examples/train.py --dataset cifar10 --data DIR --model resnet20 --cell lstm
    torchrun --nproc-per-node 8 examples/train.py --dataset imagefolder --data DIR --model timm/resnet50 --cell lstm

A run is a folder: `checkpoint.pt` after every epoch, from which `--resume` goes on to the same numbers,
`run.json` with everything that was asked and measured, and the trained network.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Data, MissingDataError, load
from options import CIFAR_MODELS, Options, Recipe, options_of
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import regulate
from regulate.archive import replaced
from regulate.models import cifar_resnet
from regulate.watch import GradientWatch


class TrainingError(RuntimeError):
    """Training cannot go on; the message is all that a user needs."""


def build(options: Options, data: Data) -> nn.Module:
    """The network: plain, or regulated at the start that fits (`random` from scratch, else `identity`)."""
    torch.manual_seed(options.seed)
    if options.model in CIFAR_MODELS:
        model: nn.Module = cifar_resnet(
            int(options.model.rpartition("resnet")[2]),
            num_classes=data.classes,
            in_channels=data.channels,
            shortcut=options.shortcut,
            reduction=8 if options.model.startswith("se_") else 0,
            width=options.width,
        )
    else:
        import timm

        model = timm.create_model(
            options.model.removeprefix("timm/"),
            pretrained=options.pretrained,
            num_classes=data.classes,
            in_chans=data.channels,
        )
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True, map_location="cpu"))
    if options.cell == "none":
        return model
    init = options.init or ("identity" if options.weights or options.pretrained else "random")
    return regulate.regulate(
        model,
        options.cell,
        kernel=options.kernel,
        fusion=options.fusion,
        init=init,
        stages=options.stages,
        seed=options.seed,
        inplace=True,
    )


@dataclass
class Run:
    """The state of a run, all that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: list[dict[str, float]]

    def save(self, path: Path) -> None:
        """Wholly or not at all."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with replaced(path) as temporary:
            torch.save({**parts, "history": self.history}, temporary)

    def load(self, path: Path) -> None:
        """Goes on where the checkpoint was written."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.history[:] = state["history"]


@dataclass(frozen=True)
class Place:
    """Where this process runs: its rank among `world` and its device."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def place(wish: str | None) -> Iterator[Place]:
    """The device, and under torchrun the process group."""
    kind = wish or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield Place(0, 1, torch.device(kind))
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    local = int(os.environ["LOCAL_RANK"])
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), torch.device(kind, local if kind == "cuda" else None))
    finally:
        dist.destroy_process_group()


def loaders(data: Data, options: Options, recipe: Recipe, at: Place) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training batches of this process and test batches; the order is set by seed and epoch alone."""
    if recipe.batch % at.world:
        raise TrainingError(
            f"a batch of {recipe.batch} does not divide into {at.world} processes; give another --batch"
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train, at.world, at.rank, shuffle=True, seed=options.seed, drop_last=True
    )
    batch = recipe.batch // at.world
    if len(sampler) < batch:
        raise TrainingError(f"{len(sampler)} training images make no batch of {batch}; give a smaller --batch")
    common: dict[str, Any] = {"num_workers": options.workers, "pin_memory": at.device.type == "cuda"}
    train: DataLoader[Any] = DataLoader(data.train, batch, sampler=sampler, drop_last=True, **common)
    return train, DataLoader(data.test, 256, **common)


def epoch(run: Run, network: nn.Module, batches: DataLoader[Any], options: Options, at: Place, number: int) -> float:
    """One pass over the training data. Returns the mean loss of this process."""
    network.train()
    batches.sampler.set_epoch(number)  # type: ignore[attr-defined]
    torch.manual_seed(options.seed * 1_000_003 + number * 1_009 + at.rank)  # of augmentation and dropout
    total, silent = 0.0, options.quiet or at.rank > 0
    bar = tqdm(batches, desc=f"epoch {number + 1}", leave=False, disable=silent, file=sys.stdout, mininterval=0.5)
    for step, (images, labels) in enumerate(bar):
        with torch.autocast(at.device.type, torch.bfloat16, enabled=options.amp):
            loss = F.cross_entropy(network(_moved(images, options, at)), labels.to(at.device))
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {number + 1}, step {step + 1}; lower --rate, or leave --amp out"
            )
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        total += value
        bar.set_postfix(loss=f"{value:.3f}")
    run.schedule.step()
    return total / len(batches)


def _moved(images: Tensor, options: Options, at: Place) -> Tensor:
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return images.to(at.device, memory_format=layout)


@torch.no_grad()
def accuracy(network: nn.Module, batches: DataLoader[Any], options: Options, at: Place) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on the test images, in per cent."""
    network.eval()
    hits = torch.zeros(2)
    count = 0
    for images, labels in batches:
        with torch.autocast(at.device.type, torch.bfloat16, enabled=options.amp):
            logits = network(_moved(images, options, at)).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices.cpu()
        right = ranked == labels[:, None]
        hits += torch.tensor([right[:, 0].sum(), right.sum()])
        count += len(labels)
    top1, top5 = (100 * hits / count).tolist()
    return top1, top5


def train(options: Options) -> dict[str, Any]:
    """Carries a run out. Returns what `run.json` holds."""
    with place(options.device) as at:
        return _train(options, at)


def _train(options: Options, at: Place) -> dict[str, Any]:
    recipe = options.plan()
    data = load(options.dataset, options.data, options.subset, options.seed, options.size)
    model = build(options, data).to(at.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones)
    run, out = Run(model, optimizer, schedule, []), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.resume and (out / "checkpoint.pt").exists():
        run.load(out / "checkpoint.pt")
    network = torch.compile(model) if options.compile else model
    if at.world > 1:
        ids = [at.device.index] if at.device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
    if options.cell != "none" and not options.compile:
        GradientWatch(model)
    train_batches, test_batches = loaders(data, options, recipe, at)
    if not run.history and at.rank == 0:
        run.save(out / "checkpoint.pt")
    for number in range(len(run.history), recipe.epochs):
        began = time.perf_counter()
        loss = epoch(run, network, train_batches, options, at, number)
        seconds = time.perf_counter() - began
        top1, top5 = accuracy(model, test_batches, options, at)
        run.history.append({"loss": loss, "top1": top1, "top5": top5, "seconds": seconds})
        if at.rank == 0:
            run.save(out / "checkpoint.pt")
            if not options.quiet:
                print(f"epoch {number + 1:>3}  loss {loss:.4f}  top-1 {top1:.2f}%  top-5 {top5:.2f}%  {seconds:.1f} s")
    report = _report(options, recipe, run, at)
    if at.rank == 0:
        with replaced(out / "run.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1))
        with replaced(out / "model.pt") as temporary:
            torch.save(model.state_dict(), temporary)
    return report


def _report(options: Options, recipe: Recipe, run: Run, at: Place) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() if at.device.type == "cuda" else _resident_peak()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "regulate": regulate.__version__}
    versions |= {name: metadata.version(name) for name in ("timm", "torchvision") if name in sys.modules}
    return {
        "options": asdict(options),
        "recipe": asdict(recipe),
        "versions": versions,
        "machine": {
            "device": at.device.type,
            "processes": at.world,
            "threads": torch.get_num_threads(),
            "instruction set": regulate.kernels.instruction_set() if at.device.type == "cpu" else None,
        },
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epochs": run.history,
        "top1": run.history[-1]["top1"],
        "top5": run.history[-1]["top5"],
        "seconds": sum(entry["seconds"] for entry in run.history),
        "peak_bytes": peak,
    }


def _resident_peak() -> int:
    """Of the whole process, in bytes; Linux counts it in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it. Returns 0, 130 after Ctrl-C, 2 for an error, which is one line on stderr."""
    options = options_of(arguments, __doc__)
    try:
        train(options)
    except KeyboardInterrupt:
        print(f"\nstopped; the last whole epoch is in {options.out}/checkpoint.pt, --resume goes on", file=sys.stderr)
        return 130
    except (TrainingError, MissingDataError, regulate.RegulateError, ValueError, RuntimeError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
