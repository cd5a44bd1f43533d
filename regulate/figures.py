"""The paper's kind of figures, of any regulated model: needs the extra `inspect` (matplotlib)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .inspect import Step, block_accuracy, gate_statistics, hidden_norm, outputs, record, similarity, stages
from .rewrite.disable import disabled


def draw(
    model: nn.Module, images: Tensor, folder: str | Path, batches: Iterable[tuple[Tensor, Tensor]] | None = None
) -> list[Path]:
    """Draws maps, similarities, gates and hidden states, and with labels the accuracy of each block.

    Args:
        model: a regulated model; left as found.
        images: (N, C, H, W), on the model's device; the maps are those of the first one.
        folder: made if it is not there.
        batches: images and labels for the accuracies, Fig. 1 (b).

    Returns:
        The files, PNG.

    Raises:
        NotRegulatedError: there are no regulators.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = record(model, images)
    with disabled(model):
        plain = outputs(model, images[:1])
    made = [_maps(steps[stage], plain, folder / f"maps-{stage}.png") for stage in steps]
    made.append(_similarity(model, images, folder / "similarity.png"))
    made.append(_memory(steps, folder / "memory.png"))
    made.append(_gates(steps, folder / "gates.png"))
    if batches is not None:
        made.append(_accuracy(model, list(batches), folder / "accuracy.png"))
    return made


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        missing = "figures need matplotlib: pip install 'regulate[inspect]'"
        raise ModuleNotFoundError(missing, name="matplotlib") from error
    if "matplotlib.pyplot" not in sys.modules:  # else whoever imported it has chosen where it draws
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _maps(steps: list[Step], plain: dict[str, Tensor], path: Path) -> Path:
    """Fig. 1 (a): for each block the mean over channels of I, H and O, and of O without the regulator."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(4, len(steps), figsize=(2 * len(steps) + 1, 8), squeeze=False, layout="constrained")
    for column, step in enumerate(steps):
        maps = (step.read, step.hidden, step.output, plain[step.block])
        for row, (name, values) in enumerate(zip(("I", "H", "O", "O, plain"), maps, strict=True)):
            axis = axes[row][column]
            axis.imshow(values[0].float().mean(0).cpu().numpy(), cmap="viridis")
            axis.set(xticks=[], yticks=[])
            if not column:
                axis.set_ylabel(name)
            if not row:
                axis.set_title(step.block, fontsize=8)
    return _saved(figure, path)


def _similarity(model: nn.Module, images: Tensor, path: Path) -> Path:
    pyplot = _pyplot()
    found = similarity(model, images)
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    place, labels = 0, []
    for names in stages(model):
        for number, (on, off) in enumerate(found[names[0]]):
            axis.bar([place - 0.2], [on], 0.4, color="tab:blue", label="" if place else "regulated")
            axis.bar([place + 0.2], [off], 0.4, color="tab:grey", label="" if place else "regulators off")
            labels.append(names[number + 1] if len(found[names[0]]) == len(names) - 1 else names[0])
            place += 1
    axis.set_xticks(range(place), labels, rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="cosine similarity to the block before", ylim=(min(0, axis.get_ylim()[0]), 1))
    axis.legend()
    return _saved(figure, path)


def _memory(steps: dict[str, list[Step]], path: Path) -> Path:
    pyplot = _pyplot()
    figure, (norms, shares) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage, line in steps.items():
        numbers = range(1, len(line) + 1)
        norms.plot(numbers, [hidden_norm(step) for step in line], "o-", label=stage)
        shares.plot(numbers, [100 * step.share for step in line], "o-", label=stage)
    norms.set(xlabel="block of the stage", ylabel="|H|, mean over images")
    shares.set(xlabel="block of the stage", ylabel="share of the fused map from H (%)")
    norms.legend(fontsize=7)
    return _saved(figure, path)


def _gates(steps: dict[str, list[Step]], path: Path) -> Path:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(steps), figsize=(3.5 * len(steps), 3.5), squeeze=False, layout="constrained")
    for axis, (stage, line) in zip(axes[0], steps.items(), strict=True):
        numbers = range(1, len(line) + 1)
        for gate in line[0].gates:
            found = [gate_statistics(step)[gate] for step in line]
            axis.errorbar(numbers, [one.mean for one in found], [one.deviation for one in found], fmt="o-", label=gate)
        axis.set(title=stage, xlabel="block of the stage", ylim=(-1.1, 1.1))
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("gate, mean ± standard deviation")
    return _saved(figure, path)


def _accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]], path: Path) -> Path:
    """Fig. 1 (b)."""
    pyplot = _pyplot()
    on = block_accuracy(model, batches)
    with disabled(model):
        off = block_accuracy(model, batches)
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(range(len(on)), list(on.values()), "o-", label="regulated")
    axis.plot(range(len(off)), list(off.values()), "s--", color="grey", label="regulators off")
    axis.set_xticks(range(len(on)), list(on), rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="accuracy of pooling and the last layer (%)", title="After each block")
    axis.legend()
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
