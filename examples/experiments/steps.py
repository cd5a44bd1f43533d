"""What a run does over and over: an epoch of training, a look at the test images."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Run, TrainingError
from .clock import Clock
from .options import Options, Recipe
from .place import Place

CHECKED_EVERY = 50  # steps; on a GPU each look at the loss waits for it


class DivergedError(TrainingError):
    """Numbers are not finite any more: an outcome of the run, not an accident."""


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
    """Return top-1 and top-5 accuracy on the test images, in per cent.

    Raises:
        DivergedError: an output is not finite.
    """
    network.eval()
    hits = torch.zeros(2, dtype=torch.float64)  # in float32 two equal differences would differ
    count = 0
    for images, labels in test:
        with job.autocast():
            logits = network(job.input(images.to(job.at.device))).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices
        if not logits.isfinite().all():
            raise DivergedError(
                "what the network says of test images is not finite; lower the rate, or compute in float32"
            )
        right = ranked == labels.to(job.at.device)[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
        count += len(labels)
    top1, top5 = (100 * hits / count).tolist()
    return top1, top5
