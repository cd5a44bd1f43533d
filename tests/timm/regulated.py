"""Regulated architectures by their names in timm, and what the tests ask of them."""

from __future__ import annotations

import timm
import torch

import regulate.timm  # noqa: F401 - it registers them
from regulate import disabled
from regulate.rewrite.guard import regulators

from ..compatibility.uses import X
from ..helpers import stir

NAME = "regulated_resnet18"


def build(name=NAME, **options):
    return timm.create_model(name, **options).eval()


def lively(path, name=NAME, **options):
    """A regulated network with weights of a file below a new classifier, whose regulators do something."""
    overlay = {"file": str(path), "num_classes": -1}
    return stir(build(name, pretrained=True, pretrained_cfg_overlay=overlay, **options))


def out(model):
    with torch.no_grad():
        return model(X)


def at_its_start(model):
    """Whether the regulators say something about the maps, and change nothing yet."""
    with torch.no_grad(), disabled(model):
        alone = model(X)
    norm = next(iter(regulators(model)))[1].mix_norm
    return torch.equal(out(model), alone) and bool((norm.running_var != 1).any())
