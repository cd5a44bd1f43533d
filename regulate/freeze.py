"""Freezes the backbone under its regulators: weights and norm statistics."""

from __future__ import annotations

from functools import partial

from torch import nn

from .guard import check_regulated, regulators

_TRAINED = "_regulate_trained_before"


def freeze_backbone(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Freezes everything that is not a regulator, or lets it go again.

    Frozen parameters get no gradient; frozen norms stay in eval mode, also after `model.train()`, so that
    their running statistics do not move. Names, types and values stay.

    Args:
        model: a regulated model. In place.
        frozen: `False` undoes an earlier call: parameters that could be trained before can be again.

    Returns:
        The model.

    Raises:
        NotRegulatedError: there are no regulators.

    Example:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> model = freeze_backbone(regulate(resnet18())).train()
        >>> model.bn1.training, model.conv1.weight.requires_grad, model.layer1[0].regulator.training
        (False, False, True)
    """
    check_regulated(model)
    new = {id(part) for _, regulator in regulators(model) for part in regulator.modules()}
    norms = [m for m in model.modules() if id(m) not in new and m._buffers.get("running_mean") is not None]
    if frozen:
        _freeze(model, norms, {id(p) for _, regulator in regulators(model) for p in regulator.parameters()})
    else:
        _release(model, norms)
    return model


def _freeze(model: nn.Module, norms: list[nn.Module], new: set[int]) -> None:
    if _TRAINED in vars(model):
        return
    old = {name: p for name, p in model.named_parameters() if id(p) not in new}
    vars(model)[_TRAINED] = tuple(name for name, p in old.items() if p.requires_grad)
    for parameter in old.values():
        parameter.requires_grad_(False)
    for norm in norms:
        norm.eval()
        # On the instance, so that the type stays; a partial, so that copies are bound to the copied norm.
        vars(norm)["train"] = partial(_stay, norm)


def _release(model: nn.Module, norms: list[nn.Module]) -> None:
    names = vars(model).pop(_TRAINED, ())
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
    for norm in norms:
        if vars(norm).pop("train", None) is not None:
            norm.train(model.training)


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    norm.training = False
    return norm
