"""Stages whose holder is not a plain nn.Sequential, and whole detectors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm import create_model
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.ops.misc import FrozenBatchNorm2d

from regulate import is_regulated, plan, regulate, unregulate
from regulate.models.by_name import load_model
from regulate.models.cifar import CifarBlock
from regulate.rewrite.lookup import containers
from regulate.testing import distance, example_inputs, perturb

from ..helpers import stir

pytestmark = pytest.mark.slow


def trained(name, size=64, **options):
    model = create_model(name, **options)
    return perturb(model, [example_inputs(model, (3, size, size), batch=4, seed=s) for s in (1, 2)]).eval()


def same_after_copies(model, x):
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("name", "held"), [("legacy_xception", [""]), ("inception_resnet_v2", ["", "repeat", "repeat_1"])]
)
def test_the_model_itself_as_holder_keeps_class_and_methods(name, held):
    model = trained(name, 128)
    regulated = regulate(model)
    assert [path for path, _, _ in containers(regulated)] == held
    assert isinstance(regulated, type(model))
    assert type(regulated).__name__ == type(model).__name__
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert distance(model(x), regulated(x)) < 1e-5
        assert distance(model.forward_features(x), regulated.forward_features(x)) < 1e-5
        assert distance(model.forward_head(model.forward_features(x)), regulated(x)) < 1e-5
    regulated.reset_classifier(7)
    assert regulated(x).shape == (2, 7)
    same_after_copies(stir(regulated).eval(), x)
    assert type(unregulate(regulated)) is type(model)


class Loop(nn.Module):
    """Blocks in a ModuleList, run by the network's own forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(CifarBlock(8, 8, 1, "B", 0) for _ in range(3))
        self.extra = 3

    def forward(self, x, scale=1.0):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x * scale

    def describe(self):
        return f"loop of {len(self.blocks)}"


def test_a_module_list_network():
    model = perturb(Loop(), [(torch.randn(4, 3, 12, 12),)] * 2).eval()
    seen = []
    model.blocks[1].register_forward_hook(lambda m, args, out: seen.append((args[0].shape, out.shape)))
    regulated = regulate(model)
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        assert distance(model(x), regulated(x)) < 1e-5
        assert torch.equal(regulated(x), regulated(x=x))
    assert isinstance(regulated, Loop)
    assert regulated.describe() == "loop of 3"
    assert regulated.extra == 3
    assert seen[0] == seen[1], "the hook saw another input or output in the regulated network"
    regulated.blocks[1]._forward_hooks.clear()
    assert [s.name for s in plan(model).stages] == ["blocks.0"]
    same_after_copies(stir(regulated).eval(), x)
    assert type(unregulate(regulated)) is Loop


class Named(nn.Sequential):
    """A container of somebody's own."""

    kind = "named"

    def widths(self):
        return [block.conv1.out_channels for block in self]


def test_a_subclass_of_sequential_keeps_its_own_methods():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Named(*(CifarBlock(8, 8, 1, "B", 0) for _ in range(2))))
    stage = regulate(model)[1]
    assert isinstance(stage, Named)
    assert (stage.widths(), stage.kind, len(stage), type(stage).__name__) == ([8, 8], "named", 2, "Named")


class Detour(Loop):
    """Has a `forward_features` that its forward does not use."""

    def forward_features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_every_method_that_runs_the_blocks_has_the_memory():
    model = perturb(Detour(), [(torch.randn(4, 3, 12, 12),)] * 2).eval()
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        assert distance(model(x), regulate(model)(x)) < 1e-5
        regulated = stir(regulate(model)).eval()
        assert torch.equal(regulated(x), regulated.forward_features(x))
        assert not torch.allclose(regulated(x), model(x), rtol=1e-2)


def test_several_stages_under_one_module():
    model = trained("dpn68")
    drawn = plan(model)
    assert [s.name for s in drawn.stages] == [f"features.conv{i}_1" for i in (2, 3, 4, 5)]
    assert {s.container for s in drawn.stages} == {"features"}
    regulated = regulate(model, stages=["features.conv3_1", 3])
    assert len([k for k in regulated.state_dict() if k.endswith("regulator.cell.gates.bias")]) == 2
    x = torch.randn(2, 3, 97, 131)
    with torch.no_grad():
        assert distance(model(x), regulated(x)) < 1e-5
    same_after_copies(stir(regulated).eval(), x)


@pytest.mark.parametrize("name", ["resnetv2_50", "regnety_002", "convnext_atto"])
def test_a_stage_honours_its_own_checkpointing_flag(name):
    model = trained(name)
    x = torch.randn(2, 3, 64, 64)
    model = stir(regulate(model))

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    cell = next(m for n, m in model.named_modules() if n.endswith("regulator.cell"))
    runs = []
    cell.register_forward_hook(lambda *_: runs.append(1))
    gradients()
    once = len(runs)
    model.set_grad_checkpointing(True)
    runs.clear()
    checkpointed = gradients()
    assert len(runs) == 2 * once
    assert all(torch.allclose(expected[n], checkpointed[n], rtol=1e-4, atol=1e-6) for n in expected)


def detector(name, frozen):
    """A detector as torchvision builds it with (frozen) or without pretrained weights."""
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5
    )
    build = {"fasterrcnn": detection.FasterRCNN, "retinanet": detection.RetinaNet}[name]
    return build(backbone, num_classes=3, min_size=96, max_size=160)


@pytest.mark.parametrize(("name", "frozen"), [("fasterrcnn", True), ("fasterrcnn", False), ("retinanet", True)])
def test_whole_detectors_on_images_of_different_sizes(name, frozen):
    model = detector(name, frozen)
    perturb(model, [example_inputs(model, (3, 96, 128), seed=s) for s in (1, 2)])
    drawn = plan(model)
    assert len(drawn.blocks) == 16
    assert {b.norm.kind for b in drawn.blocks} == {"group" if frozen else "batch"}
    regulated = regulate(model)
    assert type(regulated) is type(model)
    images = [torch.rand(3, 97, 131), torch.rand(3, 120, 100)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        for a, b in zip(model.eval()(images), regulated.eval()(images), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
    torch.manual_seed(1)
    expected = model.train()(images, [target, target])
    torch.manual_seed(1)
    losses = regulated.train()(images, [target, target])
    assert losses.keys() == expected.keys()
    if frozen:  # group norm's form is the identity in train mode, too
        assert all(torch.allclose(losses[key], expected[key], rtol=1e-4) for key in losses)
    sum(losses.values()).backward()
    new = {n: p for n, p in regulated.named_parameters() if ".regulator." in n}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.values())


def test_the_fpn_does_not_swallow_the_backbones_blocks():
    drawn = plan(detector("fasterrcnn", True))
    assert [s.name for s in drawn.stages] == [f"backbone.body.layer{i}" for i in (1, 2, 3, 4)]


def test_a_segmentation_model_returns_its_dictionary():
    model = segmentation.fcn_resnet50(weights=None, weights_backbone=None).eval()
    regulated = regulate(model)
    assert is_regulated(regulated)
    x = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        a, b = model(x), regulated(x)
    assert a.keys() == b.keys()
    assert torch.equal(a["out"], b["out"])


def test_a_super_resolution_net_without_norm():
    class EdsrBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return x + 0.1 * self.conv2(torch.relu(self.conv1(x)))

    class Edsr(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 16, 3, padding=1)
            self.body = nn.Sequential(*(EdsrBlock() for _ in range(4)), nn.Conv2d(16, 16, 3, padding=1))
            self.tail = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

        def forward(self, x):
            x = self.head(x)
            return self.tail(x + self.body(x))

    model = Edsr()
    drawn = plan(model, input_size=32)
    assert [b.name for b in drawn.blocks] == ["body.0", "body.1", "body.2", "body.3"]
    assert {b.norm.kind for b in drawn.blocks} == {"none"}
    regulated = regulate(model)
    x = torch.randn(1, 3, 15, 17)
    assert torch.equal(model.train()(x), regulated.train()(x))


def test_blocks_of_unequal_widths_say_why_they_are_left_alone():
    model = load_model("torchvision/r2plus1d_18")
    drawn = plan(model)
    assert [s.name for s in drawn.stages] == ["layer1"]
    reasons = {entry.name: entry.reason for entry in drawn.skipped}
    assert set(reasons) == {f"layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)}
    assert all("other inner widths" in reason for reason in reasons.values())
    lone = plan(load_model("resnet18"), stages=[0]).skipped
    assert not any("inner widths" in entry.reason for entry in lone)


def test_grids_that_round_down_are_cut():
    class Pooled(nn.Module):
        """The pool between read and write point drops the last row of an odd grid."""

        def __init__(self, stride):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))
            self.conv3 = nn.Conv2d(8, 8, 1)
            self.pool = nn.AvgPool2d(2) if stride > 1 else nn.Identity()

        def forward(self, x):
            return self.pool(x) + self.conv3(self.pool(torch.relu(self.conv2(torch.relu(self.conv1(x))))))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Pooled(2), Pooled(1), Pooled(1)))
    drawn = plan(model)
    assert (drawn.blocks[0].stride, drawn.blocks[0].crop) == ((2, 2), True)
    regulated = stir(regulate(model))
    for size in ((16, 16), (15, 17), (9, 8)):
        assert regulated(torch.randn(2, 3, *size)).shape == model(torch.randn(2, 3, *size)).shape
