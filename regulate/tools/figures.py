"""The paper's kind of figures, of any regulated model: needs the extra `inspect` (matplotlib)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import disabled
from ..inspect import (
    TANH_GATES,
    Step,
    block_accuracy,
    gate_statistics,
    hidden_norm,
    outputs,
    record,
    similarity,
    stages,
)


def draw(
    model: nn.Module, images: Tensor, folder: str | Path, batches: Iterable[tuple[Tensor, Tensor]] | None = None
) -> list[Path]:
    """Draw maps, similarities, gates and hidden states, and with labels the accuracy of each block.

    Args:
        model: a regulated model; left as found.
        images: (N, C, H, W), on the model's device; the maps are those of the first one.
        folder: made if it is not there.
        batches: images and labels for the accuracies, Fig. 1 (b); a network that ends without an `nn.Linear` that
            takes a block's output gets a warning instead.

    Returns:
        The files: each figure as PNG, and beside it as SVG.

    Raises:
        NotRegulatedError: there are no regulators.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = record(model, images)
    with disabled(model):
        plain = outputs(model, images[:1])
    figures = {f"maps-{stage}": _maps(steps[stage], plain, images[0]) for stage in steps}
    figures["similarity"] = _similarity(model, images)
    figures["memory"] = _memory(steps)
    figures["gates"] = _gates(steps)
    if batches is not None:
        try:
            figures["accuracy"] = _accuracy(model, list(batches))
        except ValueError as error:
            warnings.warn(f"there is no figure of the blocks' accuracy: {error}", stacklevel=2)
    return [path for name, figure in figures.items() for path in _saved(figure, folder / name)]


def _subplots(*grid: int, figsize: tuple[float, float], **options: Any) -> Any:
    """Return a figure and its axes. Not by pyplot, which keeps figures and may open windows for them."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        missing = "figures need matplotlib: pip install 'torch-regulate[inspect]'"
        raise ModuleNotFoundError(missing, name="matplotlib") from error
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def _maps(steps: list[Step], plain: dict[str, Tensor], image: Tensor) -> Any:
    """Fig. 1 (a): for each block the mean over channels of I, H and O, and of O without the regulator."""
    figure, axes = _subplots(4, len(steps) + 1, figsize=(2 * len(steps) + 3.5, 8), squeeze=False)
    rows = [
        [values[0].float().mean(0).cpu().numpy() for values in row]
        for row in zip(*((step.read, step.hidden, step.output, plain[step.block]) for step in steps), strict=True)
    ]
    # Both kinds of O on one scale, so that they can be compared.
    ranges = [_range(rows[0]), _range(rows[1]), *[_range(rows[2] + rows[3])] * 2]
    for row, (name, maps, (low, high)) in enumerate(zip(("I", "H", "O", "O, plain"), rows, ranges, strict=True)):
        for column, values in enumerate(maps, 1):
            shown = axes[row][column].imshow(values, cmap="viridis", vmin=low, vmax=high)
            if not row:
                axes[row][column].set_title(steps[column - 1].block, fontsize=8)
        axes[row][1].set_ylabel(name)
        figure.colorbar(shown, ax=list(axes[row]), shrink=0.8, label="mean over channels")
    axes[0][0].imshow(_picture(image), cmap="gray")
    axes[0][0].set_title("image", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row in range(1, 4):
        axes[row][0].axis("off")
    return figure


def _range(maps: list[Any]) -> tuple[float, float]:
    return min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)


def _picture(image: Tensor) -> Any:
    """Return a normalised image (C, H, W) as matplotlib shows it: stretched to [0, 1], grey unless C is 3."""
    image = image.float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return image.permute(1, 2, 0).numpy() if len(image) == 3 else image.mean(0).numpy()


def _similarity(model: nn.Module, images: Tensor) -> Any:
    found = similarity(model, images)
    figure, axis = _subplots(figsize=(8, 4))
    place, labels = 0, []
    for names in stages(model):
        for number, (on, off) in enumerate(found[names[0]]):
            axis.bar([place - 0.2], [on], 0.4, color="tab:blue", label="" if place else "regulated")
            axis.bar([place + 0.2], [off], 0.4, color="tab:grey", label="" if place else "regulators off")
            labels.append(names[number + 1] if len(found[names[0]]) == len(names) - 1 else names[0])
            place += 1
    axis.set_xticks(range(place), labels, rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="cosine similarity to the block before", ylim=(min(0, axis.get_ylim()[0]), 1))
    # Outside, so that it covers no bar.
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _memory(steps: dict[str, list[Step]]) -> Any:
    figure, (norms, shares) = _subplots(1, 2, figsize=(10, 4))
    for stage, line in steps.items():
        numbers = range(1, len(line) + 1)
        norms.plot(numbers, [hidden_norm(step) for step in line], "o-", label=stage)
        shares.plot(numbers, [100 * step.share for step in line], "o-", label=stage)
    norms.set(ylabel="|H|, mean over images", ylim=(0, None))
    # Never narrower than one per cent: a start of nearly nothing is to look like nothing.
    shares.set(ylabel="share of the fused map from H (%)", ylim=(0, max(1.0, 1.05 * shares.get_ylim()[1])))
    for axis in (norms, shares):
        _count_blocks(axis)
    norms.legend(fontsize=7)
    return figure


def _gates(steps: dict[str, list[Step]]) -> Any:
    """Draw a panel for each gate of each stage: mean and standard deviation over images, channels and positions."""
    names = list(next(iter(steps.values()))[0].gates)
    rows, columns = max(1, len(names)), len(steps)
    figure, axes = _subplots(rows, columns, figsize=(3 * columns, 2.2 * rows + 0.5), squeeze=False, sharex="col")
    for column, (stage, line) in enumerate(steps.items()):
        axes[0][column].set_title(stage)
        for row, gate in enumerate(names):
            found = [gate_statistics(step)[gate] for step in line]
            axis, numbers = axes[row][column], range(1, len(line) + 1)
            axis.errorbar(numbers, [one.mean for one in found], [one.deviation for one in found], fmt="o-", capsize=3)
            low = -1.0 if gate in TANH_GATES else 0.0
            axis.set(ylim=(low - 0.05, 1.05), yticks=(low, (low + 1) / 2, 1))
            if not column:
                axis.set_ylabel(f"{gate}, mean ± sd")
        _count_blocks(axes[-1][column])
    return figure


def _count_blocks(axis: Any) -> None:
    """Put whole numbers of blocks on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("block of the stage")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Any:
    """Fig. 1 (b)."""
    on = block_accuracy(model, batches)
    with disabled(model):
        off = block_accuracy(model, batches)
    figure, axis = _subplots(figsize=(6, 4))
    axis.plot(range(len(on)), list(on.values()), "o-", label="regulated")
    axis.plot(range(len(off)), list(off.values()), "s--", color="grey", label="regulators off")
    axis.set_xticks(range(len(on)), list(on), rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="accuracy of pooling and the last layer (%)", title="After each block")
    axis.legend()
    return figure


def _saved(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG."""
    paths = [path.parent / f"{path.name}.png", path.parent / f"{path.name}.svg"]
    figure.savefig(paths[0], dpi=110)
    # Without a date: the same figure is the same file.
    figure.savefig(paths[1], metadata={"Date": None})
    return paths
