"""The paper's networks, and networks by name: what they are built for, and names that are not theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import plan
from regulate.models.by_name import ModelNameError, load_model
from regulate.models.cifar import cifar_resnet


def test_a_network_for_cifar_is_planned_at_its_size():
    drawn = plan(cifar_resnet(14))
    assert drawn.input_size == (3, 32, 32)
    assert [stage.grid for stage in drawn.stages] == [(32, 32), (16, 16), (8, 8)]
    grey = cifar_resnet(14, in_channels=1)
    assert plan(grey).input_size == grey.input_size == (1, 32, 32)


@torch.no_grad()
def test_without_classes_there_is_no_classifier():
    for model in (cifar_resnet(14, num_classes=0), load_model("cifar/14", num_classes=0)):
        assert isinstance(model.fc, nn.Identity)
        assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 64)


@torch.no_grad()
def test_by_name_ten_classes_of_colour_images():
    assert load_model("cifar/14")(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    assert load_model("cifar/14", num_classes=7, in_chans=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 7)


@pytest.mark.parametrize("channels", [0, -1])
def test_an_image_has_channels(channels):
    for build in (lambda: cifar_resnet(14, in_channels=channels), lambda: load_model("cifar/14", in_chans=channels)):
        with pytest.raises(ValueError, match=f"1 channel or more, got in_channels={channels}"):
            build()


def test_the_name_of_a_regulated_architecture_is_explained(monkeypatch):
    monkeypatch.setattr("timm.is_model", lambda name: False)  # as before regulate.timm is imported
    with pytest.raises(ModelNameError, match=r"name resnet50\.a1_in1k, with --cell and so on, not regulated_resnet50"):
        load_model("regulated_resnet50.a1_in1k")
    with pytest.raises(ModelNameError, match="timm has no model 'resnet19'; did you mean"):
        load_model("resnet19")
