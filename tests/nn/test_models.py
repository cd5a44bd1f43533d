"""The paper's CIFAR networks, and what libraries are asked for by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate.models.by_name import load_model
from regulate.models.cifar import SqueezeExcite, cifar_resnet


@pytest.mark.parametrize("reduction", [4, 8, 16])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_squeeze_and_excitation_adds_its_two_layers_to_each_block(shortcut, reduction):
    plain, model = (cifar_resnet(20, shortcut=shortcut, reduction=r) for r in (0, reduction))
    plain, new = (sum(p.numel() for p in one.parameters()) for one in (plain, model))
    assert plain == {"A": 269_722, "B": 272_474}[shortcut]
    assert new - plain == sum(3 * (2 * c * (c // reduction) + c // reduction + c) for c in (16, 32, 64))


def test_squeeze_and_excitation_is_its_formula():
    part = SqueezeExcite(12, 4)
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 12, 4, 3)
    down, up = part.reduce, part.expand
    hidden = (x.mean((2, 3)) @ down.weight.flatten(1).T + down.bias).relu()
    gate = 1 / (1 + (-(hidden @ up.weight.flatten(1).T + up.bias)).exp())
    assert torch.allclose(part(x), x * gate[:, :, None, None], atol=1e-6)


def test_squeeze_and_excitation_scales_a_branch_before_the_shortcut_is_added():
    block, x = cifar_resnet(8, reduction=4).eval().layer1[0], torch.rand(2, 16, 6, 6)
    with torch.no_grad():
        branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        for bias, gate in ((-100.0, 0.0), (0.0, 0.5), (100.0, 1.0)):
            block.se.expand.weight.zero_()
            block.se.expand.bias.fill_(bias)
            assert torch.allclose(block(x), (x + gate * branch).relu(), atol=1e-6)


@pytest.fixture
def asked(monkeypatch):
    """What the libraries were asked for; weights would be downloaded."""
    found = []
    for library in ("timm.create_model", "torchvision.models.get_model"):
        monkeypatch.setattr(library, lambda name, **options: found.append((name, options)))
    return found


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_is_asked_for_weights_classes_and_channels(asked, pretrained):
    load_model("resnet18", pretrained)
    load_model("resnet18", pretrained, num_classes=7, in_chans=1)
    load_model("resnet18", pretrained, num_classes=0)
    given = ({}, {"num_classes": 7, "in_chans": 1}, {"num_classes": 0})
    assert asked == [("resnet18", {"pretrained": pretrained, **sizes}) for sizes in given]


@pytest.mark.parametrize(("pretrained", "weights"), [(True, "DEFAULT"), (False, None)])
@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("resnet18", {}),
        ("fasterrcnn_resnet50_fpn", {"weights_backbone": None}),
        ("fcn_resnet50", {"weights_backbone": None}),
        ("quantized_resnet18", {"quantize": False}),
    ],
)
def test_torchvision_is_asked_for_weights_of_the_whole_network_alone(asked, name, further, pretrained, weights):
    load_model(f"torchvision/{name}", pretrained)
    assert asked == [(name, {"weights": weights, **further})]


def test_torchvision_is_asked_for_classes(asked):
    load_model("torchvision/resnet18", num_classes=7, in_chans=3)
    assert asked == [("resnet18", {"weights": None, "num_classes": 7})]
    with pytest.raises(ValueError, match="leave out --num-classes"):
        load_model("torchvision/resnet18", pretrained=True, num_classes=7)
    with pytest.raises(ValueError, match="take 3 channels, got --in-chans 1"):
        load_model("torchvision/resnet18", in_chans=1)
    assert len(asked) == 1
