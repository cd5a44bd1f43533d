"""The training loop of every script: epochs, checkpoints, a report."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from regulate.training.gradients import GradientWatch

from . import batches, record
from .checkpoint import NAME, Run, TrainingError, alone, keep_what_is_there, written
from .data import Data, load
from .networks import build
from .options import Options, Recipe
from .place import place
from .steps import Job, accuracy, epoch


def train(options: Options) -> dict[str, Any]:
    """Carry a run out. Return what `run.json` holds.

    Raises:
        TrainingError: its folder is another run's, or another process trains there.
    """
    with place(options.device) as at:
        job = Job(options, options.plan(), at, Path(options.out))
        with alone(job.out) if at.rank == 0 else nullcontext():
            return _train(job)


def _train(job: Job) -> dict[str, Any]:
    keep_what_is_there(job.out, job.options.resume)
    data = data_of(job.options)
    model = build(job.options, data).to(job.at.device)
    run = fit(model, data, job)
    report = _report(run, job)
    if job.at.rank == 0:
        _write(report, model, job.out)
    return report


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


def fit(model: nn.Module, data: Data, job: Job, start: str | None = None) -> Run:
    """Train a network that is on the device already, with a checkpoint in the job's folder after every epoch.

    Args:
        model: trained in place.
        data: to train and to test on.
        job: whose options say how.
        start: digest of the weights that the network has, where no option names them. A run goes on from the same only.
    """
    options, recipe, at = job.options, job.recipe, job.at
    train_batches, test_batches = batches.training(data, options, at), batches.testing(data, options, at)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(model, _optimizer(model, recipe), [], _asked(options, recipe, data, start))
    _begin(run, job)
    network = _prepared(model, job)
    _tested(run, test_batches, job)  # of a run that was stopped in its test
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


def _asked(options: Options, recipe: Recipe, data: Data, start: str | None) -> dict[str, Any]:
    """Return what must be the same when a run goes on; a run may be longer, unless its end decides the rate."""
    loose = set() if recipe.rise else {"epochs"}
    asked = {name: value for name, value in options.deciding().items() if name not in loose}
    return {**asked, "weights": start or record.digest(options.weights), "data": data.digest}


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
    run.history.append(epoch(run, network, train_batches, job, number))
    if job.at.rank == 0:
        run.save(job.out / NAME)
    _tested(run, test_batches, job)
    if job.at.rank == 0 and not job.options.quiet:
        print(_line(run.history[-1], number, job), flush=True)


def _tested(run: Run, test_batches: Any, job: Job) -> None:
    """Test after the last epoch that is done, if it is due: an image that cannot be read costs no training."""
    done = len(run.history)
    due = done > 0 and (done % job.options.test_every == 0 or done == job.recipe.epochs)
    if not due or "top1" in run.history[-1]:
        return
    top1, top5 = accuracy(run.model, test_batches, job)
    run.history[-1] |= {"top1": top1, "top5": top5}
    if job.at.rank == 0:
        run.save(job.out / NAME)


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
        "data": run.asked["data"],
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
