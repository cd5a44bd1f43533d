"""The public functions: regulate and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from .analysis.meta_copy import duplicate
from .analysis.planner import make_plan
from .config import Cell, Options, RegulatorConfig, resolve_config, with_signature
from .rewrite.freezing import release
from .rewrite.guard import check_model, check_regulated, regulators, unwrapped
from .rewrite.install import check_removable, prepare, uninstall
from .rewrite.lookup import regulator_keys
from .schema.plan import Plan


@with_signature
def regulate(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    config: RegulatorConfig | None = None,
    **options: Unpack[Options],
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
        cell: `"rnn"`, `"gru"`, `"lstm"`, or a callable `channels -> nn.Module`, see `RegulatorConfig`.
        input_size: H = W, (H, W), (C, H, W) or (C, D, H, W) in pixels, which the network is planned at; by default
            what its own configuration says (timm's `pretrained_cfg`, `config.image_size` and the like), else 224.
            It decides no weight, but which blocks lie on one grid.
        example_inputs: what the model is called with, where an image is not enough: a tensor, a tuple of arguments,
            a dict of them by name, or a pair (tuple, dict). Only shapes, dtypes and constants are looked at.
        inplace: change and return `model` itself instead of a copy. If the call fails, nothing changed.
        config: all options as one value, instead of the others.
        **options: `kernel`, `fusion`, `init`, `norm`, `stages` and `seed`, see `RegulatorConfig`.

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
    config = resolve_config(config, cell, options)
    check_model(model)
    planned = make_plan(unwrapped(model), config, input_size, example_inputs)
    planned.warn_if_wide()
    prepared = prepare(unwrapped(model), planned, config)
    target = model if inplace else duplicate(model)
    prepared.install(unwrapped(target))
    return target


@with_signature
def plan(
    model: nn.Module,
    cell: Cell = "lstm",
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    config: RegulatorConfig | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Return the dry run of `regulate`: what would be rewritten, at what cost, and what is left alone and why.

    Touches nothing: no weight, statistic, mode or random state of the model.

    Args:
        model: see `regulate`.
        cell: see `regulate`.
        input_size: see `regulate`.
        example_inputs: see `regulate`.
        config: see `regulate`.
        **options: see `RegulatorConfig`.

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
    config = resolve_config(config, cell, options)
    check_model(model)
    return make_plan(unwrapped(model), config, input_size, example_inputs)


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
    keys = regulator_keys(model)
    return {key: value for key, value in model.state_dict().items() if key in keys}
