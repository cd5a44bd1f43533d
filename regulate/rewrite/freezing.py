"""Freeze the backbone under its regulators: weights and norm statistics."""

from __future__ import annotations

from functools import partial

from torch import nn

from .._compat.modules import moves_in_training
from ..rewrite.guard import check_regulated, regulators

# On each module that owns frozen parameters: their names. On each frozen norm, as before: its mode, its parent's mode,
# and a `train` of its own on the instance.
# Not on the model, so that a wrapper, what it holds and a part of that all see the same.
_PARAMETERS = "_regulate_frozen_parameters"
_MODES = "_regulate_modes_before"


def freeze_backbone(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Freeze everything that is not a regulator, or let it go again.

    Frozen parameters get no gradient; frozen norms stay in eval mode, also after `model.train()`, so that
    their running statistics do not move. Names, types and values stay. Calling it again freezes what can
    be trained since, such as norms that were put in the place of others (`convert_sync_batchnorm`).
    `unregulate` lets everything go.

    Args:
        model: a regulated model, or a wrapper around one. In place.
        frozen: `False` undoes earlier calls: parameters that could be trained before can be again, and norms
            run in the mode that they had, or in that which the model was put into since.

    Returns:
        The model.

    Raises:
        NotRegulatedError: there are no regulators.

    Examples:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> model = freeze_backbone(regulate(resnet18())).train()
        >>> model.bn1.training, model.conv1.weight.requires_grad, model.layer1[0].regulator.training
        (False, False, True)
    """
    check_regulated(model)
    if frozen:
        _freeze(model)
    else:
        release(model)
    return model


def release(model: nn.Module) -> None:
    """Undo `freeze_backbone` in a model or a part of one; without an earlier call nothing happens."""
    for module in model.modules():
        for name in vars(module).pop(_PARAMETERS, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
    for norm, parent in _with_parents(model):
        before = vars(norm).pop(_MODES, None)
        if before is not None:
            own, around, method = before
            vars(norm).pop("train", None)
            if method is not None:
                vars(norm)["train"] = method
            norm.train(own if parent.training == around else parent.training)


def _freeze(model: nn.Module) -> None:
    added = [module for _, regulator in regulators(model) for module in regulator.modules()]
    new, trained = {id(m) for m in added}, {id(p) for m in added for p in m.parameters(recurse=False)}
    for module in model.modules():
        names = [n for n, p in module._parameters.items() if p is not None and p.requires_grad and id(p) not in trained]
        if names:
            vars(module)[_PARAMETERS] = tuple(dict.fromkeys((*vars(module).get(_PARAMETERS, ()), *names)))
        for name in names:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
    for norm, parent in _with_parents(model):
        if id(norm) not in new and moves_in_training(norm) and _MODES not in vars(norm):
            vars(norm)[_MODES] = (norm.training, parent.training, vars(norm).get("train"))
            norm.eval()
            # On the instance, so that the type stays; a partial, so that copies are bound to the copied norm.
            vars(norm)["train"] = partial(_stay, norm)


def _with_parents(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return each module once, beside the one that holds it."""
    held = [(child, module) for module in model.modules() for child in module.children()]
    return [(model, model), *{id(child): (child, parent) for child, parent in held}.values()]


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    norm.training = False
    return norm
