"""Checks on one model what the documentation promises: identity at the start, gradients everywhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._compat.operators import tree_leaves
from .api import plan, regulate
from .config import RegulatorConfig
from .nn.cells import GateConv
from .rewrite.guard import regulators
from .utils.modes import in_mode, private_rng

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """What `verify` measured.

    Args:
        blocks: number of regulated blocks.
        eval_error: relative distance of the regulated network's eval outputs from the original's.
        train_difference: the same in train mode, before any training.
        lost: new weights, by gate and by half of a mix, without a finite and non-zero gradient at the third
            backward pass.
        tolerance: what `eval_error` may be at most.
    """

    blocks: int
    eval_error: float
    train_difference: float
    lost: tuple[str, ...]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether identity and gradients hold."""
        return self.eval_error <= self.tolerance and not self.lost


def perturb(model: nn.Module, batches: Sequence[Any], seed: int = 0) -> nn.Module:
    """Give an untrained network the look of a trained one, so that comparisons on it mean something.

    Affines of norms become random, negative and near-zero gains among them; parameters that start at zero
    do not stay there; batch norm statistics are measured on the batches and then jittered. In place.

    Args:
        model: any network.
        batches: two inputs or more, as the model takes them.
        seed: of a private generator.

    Returns:
        The model, in the mode that it was in.
    """
    norms = [m for m in model.modules() if m._buffers.get("running_mean") is not None]
    with private_rng(seed, 0), torch.no_grad():
        for parameter in model.parameters():
            _shake(parameter)
        kept = {norm: norm.momentum for norm in norms if hasattr(norm, "reset_running_stats")}
        for norm in kept:
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum = None  # type: ignore[assignment]
        with in_mode(model, training=True):
            for batch in batches:
                model(*batch)
        for norm in norms:
            _jitter(norm)
    for norm, momentum in kept.items():
        norm.momentum = momentum
    return model


def _shake(parameter: nn.Parameter) -> None:
    if parameter.dim() > 1:
        return
    if torch.equal(parameter, torch.ones_like(parameter)):
        draw, gain = torch.rand(parameter.shape), 0.25 + 0.75 * torch.rand(parameter.shape)
        parameter.copy_(torch.where(draw < 0.1, -gain, torch.where(draw < 0.15, 1e-3 * gain, gain)))
    elif parameter.dim() == 1 and not parameter.any():
        parameter.copy_(0.4 * (torch.rand(parameter.shape) - 0.3))
    elif not parameter.any():
        parameter.fill_(0.3)


def _jitter(norm: nn.Module) -> None:
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None and variance is not None
    mean.add_(0.1 * variance.sqrt() * torch.randn(mean.shape).to(mean))
    variance.mul_((0.8 + 0.4 * torch.rand(variance.shape)).to(variance))


def example_inputs(model: nn.Module, size: Sequence[int], batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments for a model: images (N, C, H, W), or for a torchvision detector a list and targets.

    Args:
        model: the network they are for.
        size: one image, (C, H, W).
        batch: how many.
        seed: of a private generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *size, generator=generator).to(next(model.parameters()))
    if not type(model).__module__.startswith("torchvision.models.detection"):
        return (images,)
    height, width = size[-2:]
    box = torch.tensor([[0.1 * width, 0.1 * height, 0.8 * width, 0.7 * height]])
    target: dict[str, Tensor] = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}
    target["masks"] = torch.ones(1, height, width, dtype=torch.uint8)
    target["keypoints"] = torch.tensor([[[0.3 * width, 0.3 * height, 1.0]] * 17])
    return list(images.sigmoid()), [{name: value.to(images.device) for name, value in target.items()}] * batch


def distance(a: Any, b: Any) -> float:
    """Relative distance of two outputs, tensors or nests of them: |a - b| / |a|, infinite if shapes differ."""
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    floats = [(x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point()]
    if any(x.shape != y.shape for x, y in floats):
        return math.inf
    apart = sum((x.double() - y.double()).square().sum().item() for x, y in floats)
    whole = sum(x.double().square().sum().item() for x, y in floats)
    return math.sqrt(apart / whole) if whole else math.inf if apart else 0.0


def verify(model: nn.Module, config: RegulatorConfig, size: Sequence[int] | None = None, shake: bool = True) -> Verdict:
    """Regulates a copy of a model and measures whether it keeps its promises.

    Args:
        model: the network; only read.
        config: the regulator's options.
        size: one image, (C, H, W); by default the plan's.
        shake: give an untrained network the look of a trained one first, see `perturb`.

    Raises:
        RegulateError: the model cannot be regulated.
    """
    drawn = plan(model, config=config, input_size=size)
    size = tuple(size or drawn.input_size)
    original = copy.deepcopy(model)
    if shake:
        perturb(original, [example_inputs(original, size, batch=4, seed=seed) for seed in (1, 2)])
    regulated = regulate(original, config=config, input_size=size)
    return verify_pair(original, regulated, example_inputs(original, size), len(drawn.blocks))


def verify_pair(original: nn.Module, regulated: nn.Module, inputs: tuple[Any, ...], blocks: int) -> Verdict:
    """Compare a network with its regulated self, then train the latter for three steps.

    Args:
        original: the network; its mode and statistics change.
        regulated: what `regulate` made of it; trained in place.
        inputs: the networks' arguments.
        blocks: number of regulated blocks, for the record.
    """
    with torch.no_grad():
        error = distance(_run(original, inputs, False), _run(regulated, inputs, False))
        apart = distance(_run(original, inputs, True), _run(copy.deepcopy(regulated), inputs, True))
    return Verdict(blocks, error, apart, tuple(_without_gradient(regulated, inputs)))


def _run(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Any:
    """Return the outputs with one random state for all: what is dropped in one network is dropped in the other."""
    with private_rng(0, 1):
        return model.train(training)(*inputs)


def _without_gradient(model: nn.Module, inputs: tuple[Any, ...], steps: int = 3) -> list[str]:
    """Return new weights that are dead at the third backward pass; before it, zeros at the start block some."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dead: list[str] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(_run(model, inputs, True)).backward()  # type: ignore[no-untyped-call]
        dead = [name for name, grad in _new_gradients(model) if grad is None or not _is_alive(grad)]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return dead


def loss_of(outputs: Any) -> Tensor:
    """Return some number of every tensor in a model's outputs that has a gradient."""
    found = (y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad)
    return sum((y.float().square().mean() for y in found), torch.zeros(()))


def _is_alive(grad: Tensor) -> bool:
    return bool(grad.isfinite().all() and grad.any())


def _new_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Gradients of the new parameters: of a gate convolution by gate, of a mix by half, else by tensor."""
    for path, part in regulators(model):
        for name, parameter in part.named_parameters():
            owner = part.get_submodule(name.rpartition(".")[0])
            grad, label = parameter.grad, f"{path}.{name}"
            if grad is None:
                yield label, None
            elif isinstance(owner, GateConv):
                for gate, rows in enumerate(grad.chunk(owner.gates)):
                    halves = rows.chunk(2, 1) if rows.dim() > 1 and rows.shape[1] > 1 else (rows,)
                    yield from ((f"{label} gate {gate} half {at}", half) for at, half in enumerate(halves))
            elif part.get_submodule("mix") is owner:
                write = owner.out_channels
                yield from ((f"{label} half {at}", half) for at, half in enumerate((grad[:, :write], grad[:, write:])))
            else:
                yield label, grad
