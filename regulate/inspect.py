"""What a regulator does: maps, gates and hidden states, block by block, and what they change.

Everything here runs the model in eval mode without gradients and leaves it as found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn.cells import GateConv, gate_names
from .nn.regulator import Fusion
from .rewrite.disable import disabled, is_off
from .rewrite.guard import as_written, check_regulated, regulators, unwrapped
from .rewrite.lookup import chains, check_blocks_are_called, regulated_blocks
from .utils.modes import in_mode

# Gates in (-1, 1); the others are in (0, 1).
TANH_GATES = "gn"


@dataclass(frozen=True)
class Step:
    """One block's step of the memory.

    Args:
        block: the block's path.
        read: I of the paper's Fig. 1, what the cell reads, (N, R, H, W).
        hidden: H, normalised and rectified, as it is fused and travels on, (N, R, H, W).
        output: O, the block's output, (N, C, H', W').
        gates: activated gates by name (lstm `i f g o`, gru `r z n`, rnn `n`), each (N, R, H, W).
        share: of the fused map that comes from H: |W_h h| / (|W_x x| + |W_h h|), in Frobenius norms.
    """

    block: str
    read: Tensor
    hidden: Tensor
    output: Tensor
    gates: dict[str, Tensor]
    share: float


@dataclass
class _Tape:
    """Collects, while the model runs, what belongs to the step in progress, and the steps by block."""

    read: Tensor = field(default_factory=lambda: torch.empty(0))
    gates: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    def on_cell(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Begin a step; a forward pre-hook of a cell."""
        self.read, self.gates = args[0].clone(), {}

    def on_gates(self, names: str, module: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> None:
        """Take the gates of that step; a forward hook of a gate convolution, as the one below is of a fusion."""
        for gate, value in zip(names, out, strict=True):
            self.gates[gate] = torch.tanh(value) if gate in TANH_GATES else torch.sigmoid(value)

    def on_fusion(self, block: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """End a step, for which the block's output is not there yet."""
        assert isinstance(module, Fusion)
        hidden = out[1][0].clone()
        share = _share(module, args[0], hidden)
        self.steps[block] = Step(block, self.read, hidden, torch.empty(0), self.gates, share)


def record(model: nn.Module, images: Tensor) -> dict[str, list[Step]]:
    """Run images through a regulated model and keep every step of its memory.

    Args:
        model: a regulated model; a wrapper around one will do. Its modes, hooks and gradients stay.
        images: (N, C, H, W), on the model's device.

    Returns:
        The steps of each stage in forward order, by the path of the stage's first block.

    Raises:
        NotRegulatedError: there are no regulators.
        ValueError: they are switched off.

    Examples:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> steps = record(regulate(resnet18()), torch.randn(2, 3, 64, 64))
        >>> [step.block for step in steps["layer1.0"]], sorted(steps["layer1.0"][0].gates)
        (['layer1.0', 'layer1.1'], ['f', 'g', 'i', 'o'])
    """
    tape = _Tape()
    if any(is_off(chain) for chain in chains(model)):
        raise ValueError("record follows the regulators, and they are switched off here; call it outside of `disabled`")
    with ExitStack() as hooks:
        _listen(tape, unwrapped(model), hooks)
        out = outputs(model, images)
    return {names[0]: [replace(tape.steps[name], output=out[name]) for name in names] for names in stages(model)}


def stages(model: nn.Module) -> list[list[str]]:
    """Return the paths of the regulated blocks, stage by stage."""
    held = [(path, place) for path, place in regulated_blocks(unwrapped(model))]
    lines = {
        place.chain: sorted((one.index, path) for path, one in held if one.chain is place.chain) for _, place in held
    }
    return [[path for _, path in line] for line in lines.values()]


def _listen(tape: _Tape, model: nn.Module, hooks: ExitStack) -> None:
    """Let a tape hear what regulators and gates put out, until the hooks are taken away."""
    for path, fusion in regulators(model):
        for part in fusion.modules():  # a wrapper may have been put around it
            if isinstance(part, Fusion):
                hooks.enter_context(
                    part.register_forward_hook(partial(tape.on_fusion, path.removesuffix(".regulator")))
                )
        cell = getattr(fusion, "cell", None)
        if cell is not None:
            hooks.enter_context(cell.register_forward_pre_hook(tape.on_cell))
            for name, part in cell.named_children():
                names = gate_names(cell, name) if isinstance(part, GateConv) else ""
                if names:
                    hooks.enter_context(part.register_forward_hook(partial(tape.on_gates, names)))


def _share(fusion: Fusion, x: Tensor, hidden: Tensor) -> float:
    weight, width = fusion.mix.weight.flatten(1), x.shape[1]
    own = torch.einsum("oi,ni...->no...", weight[:, :width], x).norm().item()
    memory = torch.einsum("oi,ni...->no...", weight[:, width:], hidden).norm().item()
    return float(memory / max(own + memory, 1e-12))


@dataclass(frozen=True)
class GateStatistics:
    """Of one gate at one step: mean, standard deviation, and how much of it is saturated.

    Args:
        mean: over images, channels and positions.
        deviation: likewise.
        saturated: the part within 5 % of the gate's range of one of its ends.
    """

    mean: float
    deviation: float
    saturated: float


def gate_statistics(step: Step) -> dict[str, GateStatistics]:
    """Statistics of a step's gates, by name."""
    found = {}
    for name, value in step.gates.items():
        low, high = (-1.0, 1.0) if name in TANH_GATES else (0.0, 1.0)
        edge = 0.05 * (high - low)
        saturated = ((value < low + edge) | (value > high - edge)).float().mean().item()
        found[name] = GateStatistics(value.mean().item(), value.std().item(), saturated)
    return found


def hidden_norm(step: Step) -> float:
    """Return the Euclidean norm of a step's hidden state, mean over images."""
    return float(step.hidden.flatten(1).norm(dim=1).mean())


def similarity(model: nn.Module, images: Tensor) -> dict[str, list[tuple[float, float]]]:
    """How alike consecutive blocks' outputs are, with regulators and without.

    Args:
        model: a regulated model.
        images: (N, C, H, W).

    Returns:
        For each stage, by its first block: for each pair of consecutive blocks of equal output shape the
        cosine similarity, mean over images, with the regulators and with `disabled`.
    """
    on = outputs(model, images)
    with disabled(model):
        off = outputs(model, images)
    found = {}
    for names in stages(model):
        pairs = [(a, b) for a, b in itertools.pairwise(names) if on[a].shape == on[b].shape]
        found[names[0]] = [(_cosine(on[a], on[b]), _cosine(off[a], off[b])) for a, b in pairs]
    return found


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the output of every regulated block, by its path."""
    check_blocks_are_called(model)
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found[name] = (out if isinstance(out, Tensor) else out[0]).clone()

    with in_mode(model, training=False), torch.no_grad(), as_written(), ExitStack() as hooks:
        for name in itertools.chain.from_iterable(stages(model)):
            block = unwrapped(model).get_submodule(name)
            hooks.enter_context(block.register_forward_hook(partial(note, name)))
        model(images)
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


def block_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How well each block's output is classified by average pooling and the model's last layer: Fig. 1 (b).

    Args:
        model: a regulated model whose last layer is an `nn.Linear`.
        batches: images (N, C, H, W) and labels (N,).

    Returns:
        Accuracy in per cent by block, for the blocks whose output has the width that the last layer takes.

    Raises:
        ValueError: there is no linear layer, or no block of its width.
    """
    check_regulated(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"block_accuracy needs a last nn.Linear, and {type(model).__name__} has none")
    hits, count = dict[str, int](), 0
    for images, labels in batches:
        for name, output in outputs(model, images).items():
            if output.shape[1] == linear[-1].in_features:
                with torch.no_grad():
                    right = linear[-1](output.flatten(2).mean(2)).argmax(1) == labels
                hits[name] = hits.get(name, 0) + int(right.sum())
        count += len(labels)
    if not hits:
        raise ValueError(f"no regulated block puts out the {linear[-1].in_features} channels that the last layer takes")
    return {name: 100 * right / count for name, right in hits.items()}
