"""The public functions: regulate and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .analysis.meta_copy import duplicate
from .analysis.planner import make_plan
from .config import RegulatorConfig
from .rewrite.freezing import release
from .rewrite.guard import check_model, check_regulated, regulators, unwrapped
from .rewrite.install import check_removable, prepare, uninstall
from .schema.plan import Plan

Cell = str | Callable[[int], nn.Module]


def regulate(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    kernel: str = "light",
    fusion: str = "paper",
    init: str = "identity",
    norm: str = "auto",
    stages: Sequence[str | int] | None = None,
    seed: int | None = None,
    inplace: bool = False,
    config: RegulatorConfig | None = None,
) -> nn.Module:
    """Splice regulators into the residual blocks of a network: Eq. (2) and (3) of arXiv 2101.00590.

    The blocks of a stage share one recurrent cell. Each block reads the map X2 behind its first
    convolution, the cell turns it and the memory of the blocks before into a hidden state H, and a 1x1
    fusion mixes H into the map that enters the block's last convolution. In eval mode the result computes
    what the model computed, to rounding, until it is trained.

    The result is the same object inside: class, methods, hooks, parameters' names, values and order. New
    tensors are named `<block>.regulator.{hidden_norm,mix,mix_norm}` and, for the cell,
    `<first block of the stage>.regulator.cell`. Hidden state starts at zero in every forward pass.

    Args:
        model: an image network, input (N, C, H, W), of timm, torchvision or your own, also inside
            `nn.DataParallel` or `torch.compile`, which stay around it. Left untouched unless `inplace`.
            Residual blocks are found by dataflow, see docs/how-it-works.md.
        cell: `"rnn"` (Eq. (1)), `"gru"`, `"lstm"`, or a callable `channels -> nn.Module` that follows the
            cell protocol of `regulate.nn.cells`.
        input_size: H = W, (H, W), (C, H, W) or (C, D, H, W) in pixels, which the network is planned at; by default
            what its own configuration says (timm's `pretrained_cfg`, `config.image_size` and the like), else 224.
            It decides no weight, but which blocks lie on one grid.
        example_inputs: what the model is called with, where an image is not enough: a tensor, a tuple of arguments,
            a dict of them by name, or a pair (tuple, dict). Only shapes, dtypes and constants are looked at.
        kernel: `"light"`, the paper's grouped 1x1 and depthwise 3x3, or `"dense"`, a full 3x3.
        fusion: `"paper"`, `act(BN(W * concat[x, h]))`, or `"residual"`, `x + W * concat[x, h]`, which is
            the identity in train mode too.
        init: `"identity"`; `"unit"`, the same with unit statistics; `"random"`, to train from scratch.
        norm: of what is new: `"auto"` follows the block's, else `"batch"`, `"group"` or `"none"`.
        stages: names or 0-based indices, in forward order, of the stages to regulate; `plan(model)` lists
            them. The paper's RegNet(i) is `stages=[i - 1]`.
        seed: for the new weights. `None` takes `torch.initial_seed()`. The global generator is not used.
        inplace: change and return `model` itself instead of a copy. If the call fails, nothing changed.
        config: all options as one value, instead of the others.

    Returns:
        The regulated network, in the model's training mode, on its device and in its dtype.

    Raises:
        NoBlocksError: there is no residual block to regulate.
        UnknownStageError: `stages` names one that is not there; the message lists those that are.
        UnsupportedModelError: DistributedDataParallel or FSDP is around it already, it is a scripted model,
            or no module.
        AlreadyRegulatedError: the model has regulators.
        ValueError, TypeError: an option has a wrong value, or `config` came with other options.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> regulated = regulate(model, cell="gru")
        >>> image = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(regulated(image), model(image), rtol=1e-4, atol=1e-5)
        True
    """
    options = _options(cell, kernel, fusion, init, norm, stages, seed, config)
    check_model(model)
    planned = make_plan(unwrapped(model), options, input_size, example_inputs)
    planned.warn_if_wide()
    prepared = prepare(unwrapped(model), planned, options)
    target = model if inplace else duplicate(model)
    prepared.install(unwrapped(target))
    return target


def plan(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    kernel: str = "light",
    fusion: str = "paper",
    init: str = "identity",
    norm: str = "auto",
    stages: Sequence[str | int] | None = None,
    seed: int | None = None,
    config: RegulatorConfig | None = None,
) -> Plan:
    """Return the dry run of `regulate`: what would be rewritten, at what cost, and what is left alone and why.

    Touches nothing: no weight, statistic, mode or random state of the model.

    Args:
        model: see `regulate`.
        cell: see `regulate`; likewise the keywords that are not explained here.
        input_size: see `regulate`.
        example_inputs: see `regulate`.
        kernel: see `regulate`.
        fusion: see `regulate`.
        init: see `regulate`.
        norm: see `regulate`.
        stages: see `regulate`.
        seed: see `regulate`.
        config: see `regulate`.

    Returns:
        The plan. `print(plan)` is a table, `plan.to_dict()` is JSON.

    Raises:
        RegulateError: as `regulate` does.

    Examples:
        >>> from torchvision.models import resnet50
        >>> drawn = plan(resnet50())
        >>> [stage.name for stage in drawn.stages], drawn.parameters
        (['layer1', 'layer2', 'layer3', 'layer4'], 2576128)
    """
    options = _options(cell, kernel, fusion, init, norm, stages, seed, config)
    check_model(model)
    return make_plan(unwrapped(model), options, input_size, example_inputs)


def unregulate(model: nn.Module) -> nn.Module:
    """Take the regulators out: the original network with its current weights.

    After training, its outputs are those of the fine-tuned backbone alone, not the regulated ones. What
    `freeze_backbone` froze is let go.

    Args:
        model: a regulated model. In place; parameters, hooks and types are the original objects.

    Returns:
        The model.

    Raises:
        NotRegulatedError: there are no regulators.
        UnsupportedModelError: another tool has changed the class of a regulated module since, or the model is a
            part of a stage.

    Examples:
        >>> from torchvision.models import resnet18
        >>> "layer1.0.regulator.mix.weight" in unregulate(regulate(resnet18())).state_dict()
        False
    """
    check_regulated(model)
    check_removable(model)
    release(model)
    uninstall(model)
    return model


def regulator_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return the new parameters, for an optimizer group of their own.

    Args:
        model: a regulated model; a wrapper around one will do.

    Returns:
        An iterator over each new parameter once, shared with the model.

    Raises:
        NotRegulatedError: there are no regulators.

    Examples:
        >>> from torchvision.models import resnet50
        >>> sum(p.numel() for p in regulator_parameters(regulate(resnet50())))
        2576128
    """
    check_regulated(model)
    return (parameter for _, regulator in regulators(model) for parameter in regulator.parameters())


def regulator_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Exactly the new tensors of the state dict, norm statistics included.

    Args:
        model: a regulated model.

    Returns:
        Tensors that share memory with the model, under their names in its state dict.

    Raises:
        NotRegulatedError: there are no regulators.

    Examples:
        >>> from torchvision.models import resnet18
        >>> sorted(regulator_state_dict(regulate(resnet18())))[0]
        'layer1.0.regulator.cell.gates.bias'
    """
    check_regulated(model)
    roots = tuple(f"{path}." for path, _ in regulators(model))
    return {key: value for key, value in model.state_dict().items() if key.startswith(roots)}


def _options(
    cell: Cell,
    kernel: str,
    fusion: str,
    init: str,
    norm: str,
    stages: Sequence[str | int] | None,
    seed: int | None,
    config: RegulatorConfig | None,
) -> RegulatorConfig:
    given = RegulatorConfig(cell, kernel, fusion, init, norm, stages, seed)  # type: ignore[arg-type]
    if config is None:
        return given
    if given != RegulatorConfig():
        raise TypeError("config= holds every option, but other options were given beside it; pass one or the other")
    return config
