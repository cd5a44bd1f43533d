"""The training loop of every script: epochs, checkpoints, a report."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from regulate.training.gradients import GradientWatch

from . import batches, record
from .checkpoint import NAME, Run, TrainingError, read, written
from .clock import Clock
from .data import Data, load
from .networks import build
from .options import Options, Recipe
from .place import Place, place

CHECKED_EVERY = 50  # steps; on a GPU each look at the loss waits for it


class DivergedError(TrainingError):
    """The loss is not finite: an outcome of the run, not an accident."""


@dataclass(frozen=True)
class Job:
    """What does not change during a run."""

    options: Options
    recipe: Recipe
    at: Place
    out: Path

    def input(self, images: Tensor) -> Tensor:
        """Return images in the layout of the network's weights."""
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(self.at.device.type, torch.bfloat16, enabled=self.options.amp)


def epoch(run: Run, network: nn.Module, train: Any, job: Job, number: int) -> dict[str, float]:
    """Train for one epoch. Return loss and accuracy on this process's training images as they went by, and seconds."""
    network.train()
    train.epoch = number
    # For dropout and drop path; order and crops have generators of their own.
    torch.manual_seed(job.options.seed * 1_000_003 + number * 1_009 + job.at.rank)
    sums = torch.zeros(2, dtype=torch.float64, device=job.at.device)
    count, clock = 0, Clock()
    silent = job.options.quiet or job.at.rank > 0 or not sys.stdout.isatty()
    for step, (images, labels) in enumerate(tqdm(train, f"epoch {number + 1}", leave=False, disable=silent)):
        for group in run.optimizer.param_groups:
            group["lr"] = job.recipe.rate_at(number + (step + 0.5) / len(train))
        with job.autocast():
            logits = network(job.input(images))
            loss = F.cross_entropy(logits, labels)
        run.optimizer.zero_grad()
        loss.backward()
        if job.options.clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), job.options.clip)
        run.optimizer.step()
        sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        count += len(labels)
        if (step + 1) % CHECKED_EVERY == 0 or step + 1 == len(train):
            _check_finite(sums[0].item(), number, step)
        if step == 0:
            clock.first_step_done()
    loss_sum, hits = sums.tolist()
    return {"loss": loss_sum / count, "train_top1": 100 * hits / count, **clock.read(len(train))}


def _check_finite(total: float, number: int, step: int) -> None:
    if not math.isfinite(total):
        raise DivergedError(
            f"the loss is {total} in epoch {number + 1}, by step {step + 1}; lower the rate, or compute in float32; "
            "the last checkpoint is as it was"
        )


@torch.no_grad()
def accuracy(network: nn.Module, test: Iterable[tuple[Tensor, Tensor]], job: Job) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy on the test images, in per cent."""
    network.eval()
    hits = torch.zeros(2, dtype=torch.float64)  # in float32 two equal differences would differ
    count = 0
    for images, labels in test:
        with job.autocast():
            logits = network(job.input(images.to(job.at.device))).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices
        right = ranked == labels.to(job.at.device)[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
        count += len(labels)
    top1, top5 = (100 * hits / count).tolist()
    return top1, top5


def train(options: Options) -> dict[str, Any]:
    """Carry a run out. Return what `run.json` holds."""
    with place(options.device) as at:
        return _train(Job(options, options.plan(), at, Path(options.out)))


def _train(job: Job) -> dict[str, Any]:
    _keep_what_is_there(job)
    data = data_of(job.options)
    model = build(job.options, data).to(job.at.device)
    run = fit(model, data, job)
    report = _report(run, job)
    if job.at.rank == 0:
        _write(report, model, job.out)
    return report


def _keep_what_is_there(job: Job) -> None:
    """Make sure that no run's epochs are lost to one that was meant to go on, or for another folder."""
    path = job.out / NAME
    if job.options.resume or not path.exists():
        return
    if done := len(read(path)["history"]):
        raise TrainingError(
            f"{path} holds {done} epochs of a run; give --resume to go on with it, or another --out to begin another"
        )


def data_of(options: Options) -> Data:
    """Load the data that a run asks for."""
    return load(
        options.dataset,
        options.data,
        options.subset,
        options.seed,
        options.size,
        options.cache,
        options.like,
        options.model.removeprefix("timm/") if options.model.startswith("timm/") else None,
    )


def fit(model: nn.Module, data: Data, job: Job) -> Run:
    """Train a network that is on the device already, with a checkpoint in the job's folder after every epoch."""
    options, recipe, at = job.options, job.recipe, job.at
    train_batches, test_batches = batches.training(data, options, at), batches.testing(data, options, at)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(model, _optimizer(model, recipe), [], _asked(options, recipe))
    _begin(run, job)
    network = _prepared(model, job)
    for number in range(len(run.history), recipe.epochs):
        _one_epoch(run, network, train_batches, test_batches, job, number)
    return run


def _begin(run: Run, job: Job) -> None:
    """Go on from the folder's checkpoint if that was asked for, else write one."""
    path = job.out / NAME
    job.out.mkdir(parents=True, exist_ok=True)
    if job.options.resume and path.exists():
        run.load(path)
    if len(run.history) > job.recipe.epochs:
        raise TrainingError(
            f"{path} holds {len(run.history)} epochs, and {job.recipe.epochs} were asked for; ask for as many or more"
        )
    run.goes_on(record.origin(job.at))
    if not run.history and job.at.rank == 0:
        (job.out / "run.json").unlink(missing_ok=True)
        run.save(path)


def _asked(options: Options, recipe: Recipe) -> dict[str, Any]:
    """Return what must be the same when a run goes on; a run may be longer, unless its end decides the rate."""
    loose = set() if recipe.rise else {"epochs"}
    asked = {name: value for name, value in options.deciding().items() if name not in loose}
    return {**asked, "weights": record.digest(options.weights)}


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, recipe.rate, recipe.momentum, weight_decay=recipe.decay, nesterov=recipe.nesterov)


def _prepared(model: nn.Module, job: Job) -> nn.Module:
    """Compiled, in parallel, watched: as asked."""
    network: nn.Module = torch.compile(model) if job.options.compile else model  # type: ignore[assignment]
    if job.at.world > 1:
        ids = [job.at.device.index] if job.at.device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
    if job.options.cell != "none" and not job.options.compile:
        GradientWatch(model)
    return network


def _one_epoch(run: Run, network: nn.Module, train_batches: Any, test_batches: Any, job: Job, number: int) -> None:
    entry = epoch(run, network, train_batches, job, number)
    if (number + 1) % job.options.test_every == 0 or number + 1 == job.recipe.epochs:
        entry["top1"], entry["top5"] = accuracy(run.model, test_batches, job)
    run.history.append(entry)
    if job.at.rank == 0:
        run.save(job.out / NAME)
        if not job.options.quiet:
            print(_line(entry, number, job), flush=True)


def _line(entry: dict[str, float], number: int, job: Job) -> str:
    before = f"{time.strftime('%H:%M:%S')}  {job.options.name}: " if job.options.name else ""
    tested = f"top-1 {entry['top1']:.2f}%  top-5 {entry['top5']:.2f}%  " if "top1" in entry else ""
    return (
        f"{before}epoch {number + 1:>3} of {job.recipe.epochs}  loss {entry['loss']:.4f}  "
        f"training {entry['train_top1']:.2f}%  {tested}{entry['seconds']:.1f} s"
    )


def _report(run: Run, job: Job) -> dict[str, Any]:
    return {
        "options": job.options.deciding(),
        "recipe": asdict(job.recipe),
        "weights": run.asked["weights"],
        **{name: value for name, value in run.parts[0].items() if name != "epoch"},
        "later": run.parts[1:],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epochs": run.history,
        "top1": run.history[-1]["top1"],
        "top5": run.history[-1]["top5"],
        **{name: sum(entry[name] for entry in run.history) for name in ("seconds", "processor_seconds")},
        "peak_bytes": record.peak_bytes(job.at),
    }


def _write(report: dict[str, Any], model: nn.Module, out: Path) -> None:
    """Write the network first: a run with a report is finished."""
    with written(out / "model.safetensors") as temporary:
        save_file({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, temporary)
    with written(out / "run.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
