"""Files of other libraries with the state dict of a regulated network: `load` tells its options by names and shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from regulate import CheckpointError, load, regulate
from regulate.models.cifar import cifar_resnet

from ..helpers import stir

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def without_norms():
    model = cifar_resnet(14)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def written(model, path, drop=(), **more):
    state = {key: value.clone() for key, value in model.state_dict().items() if key not in drop}
    save_file({**state, **more}, path, metadata={"format": "pt"})
    return path


def comes_back(build, path, **options):
    torch.manual_seed(0)
    regulated = stir(regulate(build(), **options)).eval()
    back = load(build(), written(regulated, path), input_size=options.get("input_size")).eval()
    with torch.no_grad():
        return torch.equal(back(X), regulated(X))


@pytest.mark.parametrize(
    ("cell", "kernel", "fusion"),
    list(itertools.product(["rnn", "gru", "lstm"], ["light", "dense"], ["paper", "residual"])),
)
def test_cells_kernels_and_fusions(cell, kernel, fusion, tmp_path):
    assert comes_back(lambda: cifar_resnet(14), tmp_path / "a.safetensors", cell=cell, kernel=kernel, fusion=fusion)


@pytest.mark.parametrize("options", [
    {"norm": "group"}, {"norm": "group", "fusion": "residual"}, {"stages": [1]}, {"stages": ["layer1", "layer3"]},
    {"init": "random"},
], ids=str)  # fmt: skip
def test_norms_and_stages(options, tmp_path):
    assert comes_back(lambda: cifar_resnet(14), tmp_path / "a.safetensors", **options)


@pytest.mark.parametrize(("build", "options"), [
    (without_norms, {}), (without_norms, {"fusion": "residual"}), (lambda: cifar_resnet(14), {"norm": "none"}),
])  # fmt: skip
def test_fusions_that_only_an_activation_tells_apart_are_refused(build, options, tmp_path):
    with pytest.raises(CheckpointError, match="have the same tensors"):
        comes_back(build, tmp_path / "a.safetensors", **options)


def test_a_plain_state_dict_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not written by regulate\.save and holds no regulators"):
        load(cifar_resnet(14), written(cifar_resnet(14), tmp_path / "a.safetensors"))


@pytest.mark.parametrize("build", [lambda: cifar_resnet(20), lambda: cifar_resnet(14, num_classes=7), resnet18])
def test_another_network_is_refused(build, tmp_path):
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(CheckpointError, match=r"differ in name, dtype or shape|stages"):
        load(model, written(regulate(cifar_resnet(14)), tmp_path / "a.safetensors"), inplace=True)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["a cell of the user's own", "no fusion", "a scalar", "another width", "one missing"])
def test_regulators_that_are_none_of_this_library(kind, tmp_path):
    regulated, at = regulate(cifar_resnet(14)), "layer1.0.regulator."
    drop, more = (), {}
    if kind == "a cell of the user's own":
        drop = [key for key in regulated.state_dict() if f"{at}cell" in key]
        more = {f"{at}cell.conv.weight": torch.zeros(3)}
    elif kind == "no fusion":
        drop = [f"{at}mix.weight"]
    elif kind == "a scalar":
        drop, more = [f"{at}mix.weight"], {f"{at}mix.weight": torch.zeros(())}
    elif kind == "another width":
        drop, more = [f"{at}mix.weight"], {f"{at}mix.weight": torch.zeros(16, 33, 1, 1)}
    else:
        drop = ["layer2.1.regulator.mix_norm.bias"]
    path = written(regulated, tmp_path / "a.safetensors", drop, **more)
    with pytest.raises(CheckpointError, match=r"of no cell of this library|differ in name, dtype or shape"):
        load(cifar_resnet(14), path)
