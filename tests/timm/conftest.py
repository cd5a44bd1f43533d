"""Weights of a plain and of a regulated network, as files."""

from __future__ import annotations

import pytest
import torch

from ..helpers import network, stir
from .regulated import build


@pytest.fixture(scope="module")
def plain():
    """A network of timm's that looks trained, with its weights as a file."""
    return network("resnet18")


@pytest.fixture(scope="module")
def original(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(plain.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """A regulated network whose regulators do something, and its state as a file."""
    model = stir(build(pretrained=True, pretrained_cfg_overlay={"file": original}))
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    return model, str(path)
