"""torchvision's tools on a regulated network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from regulate import regulate
from regulate.rewrite.guard import regulators

from ..helpers import stir
from .uses import ONE, TORCHVISION, X, close, passing, plain, regulated, use

pytestmark = pytest.mark.gate

STAGES = ["layer1", "layer2", "layer3", "layer4"]
LAYERS = {stage: str(i) for i, stage in enumerate(STAGES)}


@use("torchvision", "IntermediateLayerGetter", TORCHVISION)
def test_layer_getter(name):
    model = regulated(name)
    expected = passing(model, STAGES)
    with torch.no_grad():
        assert close(list(IntermediateLayerGetter(model, LAYERS)(X).values()), expected)


def extracted(model, nodes):
    net = create_feature_extractor(model, {node: node for node in nodes})
    with torch.no_grad():
        found = net(X)
    return [found[node] for node in nodes]


@use("torchvision", "create_feature_extractor: stages, later blocks, nodes by their whole name", TORCHVISION)
def test_feature_extractor(name):
    model = regulated(name)
    paths = ["layer1", "layer2.1", "layer3", "layer4"]  # torchvision gives a node to one name only
    expected = passing(model, [*paths, "layer4.0"])
    last = "layer4.0.relu_2" if "50" in name else "layer4.0.relu_1"
    assert last in get_graph_node_names(model)[1]
    assert close(extracted(model, [*paths, last]), expected)


SHORT = (
    "torchvision takes a short name for the last node below it, and below the first block of a stage that is the "
    "cell's last step (pytorch/vision#3597); give the node, such as `layer4.0.relu_1`, or take a hook"
)


@use("torchvision", "create_feature_extractor: the first block of a stage by its short name", ONE, {ONE[0]: SHORT})
def test_feature_extractor_by_short_name(name):
    model = regulated(name)
    assert close(extracted(model, ["layer4.0"]), passing(model, ["layer4.0"]))


@use("torchvision", "BackboneWithFPN", TORCHVISION)
def test_fpn(name):
    model = regulated(name)
    features = passing(model, STAGES)
    widths = [feature.shape[1] for feature in features]
    net = BackboneWithFPN(model, LAYERS, widths, 16).eval()
    with torch.no_grad():
        found = net(X)
        expected = net.fpn(dict(zip("0123", features, strict=True)))
        assert close(dict(found), dict(expected))


def detector(backbone):
    torch.manual_seed(2)
    fpn = BackboneWithFPN(backbone, LAYERS, [64, 128, 256, 512], 16)
    return FasterRCNN(fpn, num_classes=3, min_size=64, max_size=64, box_detections_per_img=5).eval()


@use("torchvision", "Faster R-CNN on a regulated backbone: detects and trains")
def test_faster_rcnn(name):
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    old, new = detector(plain(name)), detector(regulate(plain(name)))
    with torch.no_grad():
        a, b = old(images), new(images)
        assert all(close(x["boxes"], y["boxes"]) and close(x["scores"], y["scores"]) for x, y in zip(a, b, strict=True))
        stir(new)
        assert not close(new.backbone(X)["0"], old.backbone(X)["0"], 1e-2)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]
    losses = new.train()(images, targets)
    sum(losses.values()).backward()
    assert all(fusion.mix.weight.grad.any() for _, fusion in regulators(new))


@use("torchvision", "forward and backward hooks on layer4[-1], as Grad-CAM sets them", TORCHVISION)
def test_grad_cam(name):
    model = regulated(name)
    seen = {}

    def keep(module, args, out):
        seen["map"] = out
        out.register_hook(lambda grad: seen.__setitem__("gradient", grad))

    model.layer4[-1].register_forward_hook(keep)
    model(X)[:, 3].sum().backward()
    weights = seen["gradient"].mean((2, 3), keepdim=True)
    assert (weights * seen["map"]).sum(1).shape == (2, 2, 2)
    # The last map is averaged, so its gradient is the classifier's row over the number of positions.
    row = model.fc.weight[3].detach()[None, :, None, None].expand_as(seen["gradient"]) / 4
    assert close(seen["gradient"], row)
    assert close(model.fc(seen["map"].mean((2, 3))), model(X))


@use("torchvision", "isinstance of blocks; len, index, iteration of stages", TORCHVISION)
def test_blocks(name):
    model, old = regulated(name), plain(name)
    for stage in STAGES:
        mine, theirs = getattr(model, stage), getattr(old, stage)
        assert len(mine) == len(theirs)
        assert [type(block).__qualname__ for block in mine] == [type(block).__qualname__ for block in theirs]
        assert all(isinstance(block, type(theirs[0])) for block in mine)
        assert mine[-1] is list(mine.children())[-1]
        assert [n for n, _ in mine.named_children()] == [n for n, _ in theirs.named_children()]
    assert isinstance(copy.deepcopy(model).layer1[0], type(old.layer1[0]))
    assert isinstance(model.layer1, nn.Sequential)
