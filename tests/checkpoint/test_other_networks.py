"""Files of another backbone, architecture, activation or head: CheckpointError, which says where they differ."""

from __future__ import annotations

import pytest
import torch

from regulate import CheckpointError, freeze_backbone, load, regulate, save
from regulate.models.by_name import load_model

from ..helpers import network, stirred
from .states import same

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("key", ["conv1.weight", "layer3.1.bn2.running_mean", "layer1.0.bn1.running_var", "fc.bias"])
@pytest.mark.use("save, load, switch", "regulators alone on another backbone: CheckpointError")
def test_another_backbone_is_an_error_that_says_where(key, tmp_path):
    base = network("torchvision/resnet18")
    save(stirred(base), tmp_path / "a", regulator_only=True)
    base.state_dict()[key].view(-1)[0] += 1e-6
    with pytest.raises(CheckpointError, match=rf"1 of 102 tensors differ, first {key}.*freeze_backbone"):
        load(base, tmp_path / "a")


def test_training_with_a_frozen_backbone_keeps_the_fingerprint(tmp_path):
    base = network("torchvision/resnet18")
    kept, loose = freeze_backbone(regulate(base)).train(), regulate(base).train()
    for model in (kept, loose):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(X).square().mean().backward()
        optimizer.step()
    save(kept, tmp_path / "a", regulator_only=True)
    assert same(load(base, tmp_path / "a"), kept)
    save(loose, tmp_path / "b", regulator_only=True)
    with pytest.raises(CheckpointError, match="trained along"):
        load(base, tmp_path / "b")


@pytest.mark.parametrize(
    ("saved", "given", "says"),
    [
        ("resnet18", "torchvision/mobilenet_v2", "MobileNetV2"),
        ("resnet18", "resnet50", "timm's resnet18"),
        ("torchvision/resnet50", "torchvision/wide_resnet50_2", "block layer1.0 was regulated with read_width 64"),
        ("torchvision/resnet18", "torchvision/resnet34", "stages"),
        ("torchvision/resnet18", "torchvision/vgg11", "VGG"),
    ],
)
def test_another_architecture_is_an_error_that_says_where(saved, given, says, tmp_path):
    save(regulate(load_model(saved)), tmp_path / "a")
    with pytest.raises(CheckpointError, match=says):
        load(load_model(given), tmp_path / "a")


def test_another_activation_is_an_error(tmp_path):
    from timm import create_model

    save(regulate(create_model("resnet18")), tmp_path / "a")
    with pytest.raises(CheckpointError, match="activation 'relu', here 'none'"):
        load(create_model("resnet18", act_layer="silu"), tmp_path / "a")


def test_another_number_of_classes_is_an_error(tmp_path):
    from timm import create_model

    save(regulate(create_model("resnet18", num_classes=7)), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"fc.weight: float32 \(7, 512\)"):
        load(create_model("resnet18"), tmp_path / "a")


@pytest.mark.parametrize("options", [{}, {"stages": [0]}], ids=str)
def test_a_part_that_was_regulated_alone_is_loaded_into_the_whole(options, tmp_path):
    from timm import create_model

    def build():
        return create_model("resnet18", num_classes=3).eval()

    model = build()
    model.layer3 = stirred(model.layer3, **options)
    save(model, tmp_path / "a")
    for again in (load(build(), tmp_path / "a"), load(build(), tmp_path / "a", inplace=True)):
        assert same(again, model)
        assert torch.equal(again(X), model(X))
        save(again, tmp_path / "b")
        assert same(load(build(), tmp_path / "b"), model)


def test_two_parts_that_were_regulated_alone_are_loaded_into_the_whole(tmp_path):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = network("resnet18"), network("resnet18")

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Pair().eval()
    model.a, model.b = stirred(model.a), stirred(model.b)
    save(model, tmp_path / "a")
    assert same(load(Pair().eval(), tmp_path / "a"), model)


def test_a_whole_that_became_a_part_and_a_part_of_a_whole_are_loaded(tmp_path):
    model = stirred(network("resnet18"))
    save(torch.nn.Sequential(model), tmp_path / "a")
    assert same(load(torch.nn.Sequential(network("resnet18")), tmp_path / "a")[0], model)
    save(model.layer3, tmp_path / "b")
    assert same(load(network("resnet18").layer3, tmp_path / "b"), model.layer3)
