"""optimize_for_inference: the same outputs in fewer operations."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torchvision.models.video import r3d_18

from regulate import (
    CheckpointError,
    NotRegulatedError,
    UnsupportedModelError,
    is_regulated,
    kernels,
    optimize_for_inference,
    regulate,
    save,
    unregulate,
)
from regulate.rewrite.guard import regulators

from ..helpers import network, stir, stirred

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NETWORKS = ["resnet18", "torchvision/resnet50", "seresnext26d_32x4d", "dpn48b", "resnetv2_18", "cifar/20"]


def norms(model, kind=nn.BatchNorm2d):
    return sum(isinstance(part, kind) for _, fusion in regulators(model) for part in fusion.modules())


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_outputs_without_norms(name, form):
    model = stirred(network(name)).double().float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = optimize_for_inference(model)
    with torch.no_grad(), kernels.use(form):
        expected, found = model(X), folded(X)
    # In double, too: fp32 rounding of a deep network hides errors below its own size.
    with torch.no_grad():
        exact = optimize_for_inference(model.double())(X.double())
        assert torch.allclose(exact, model(X.double()), rtol=1e-9, atol=1e-9)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    model.float()
    assert norms(model) > 0
    assert norms(folded) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_outputs_agree_to_rounding_at_the_start():
    model = regulate(network("resnet18"))
    with torch.no_grad():
        expected, found = model(X), optimize_for_inference(model)(X)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_the_added_map_goes_into_the_convolution():
    model = stirred(network("resnet18"), fusion="residual")
    folded = optimize_for_inference(model)
    assert all(fusion.skip for _, fusion in regulators(model))
    assert not any(fusion.skip for _, fusion in regulators(folded))
    with torch.no_grad():
        exact = optimize_for_inference(model.double())(X.double())
        assert torch.allclose(exact, model(X.double()), rtol=1e-9, atol=1e-9)
        assert folded(X).shape == exact.shape


def test_group_norms_stay():
    model = stirred(network("resnet18"), norm="group")
    folded = optimize_for_inference(model)
    assert norms(folded, nn.GroupNorm) == norms(model, nn.GroupNorm) > 0
    with torch.no_grad():
        assert torch.allclose(folded(X), model(X), rtol=1e-4, atol=1e-4)


def test_what_the_copy_is():
    model = regulate(network("resnet18")).train()
    folded = optimize_for_inference(model)
    assert model.training
    assert not folded.training
    assert type(folded) is type(model)
    assert is_regulated(folded)
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UnsupportedModelError, match="start from the original"):
        optimize_for_inference(folded)
    with pytest.raises(CheckpointError, match="save the original"):
        save(folded, "nowhere.safetensors")
    unregulate(folded)
    assert not is_regulated(folded)


def test_a_plain_network_is_an_error():
    with pytest.raises(NotRegulatedError):
        optimize_for_inference(network("resnet18"))


def test_three_dimensional_networks():
    model = stir(regulate(network("torchvision/resnet18"))).eval()
    video = stir(regulate(r3d_18())).eval()
    assert norms(optimize_for_inference(model)) == 0
    clip = torch.randn(1, 3, 4, 32, 32).double()
    folded = optimize_for_inference(video.double())
    assert norms(folded, nn.BatchNorm3d) == 0
    with torch.no_grad():
        assert torch.allclose(folded(clip), video(clip), rtol=1e-9, atol=1e-9)


def test_it_can_be_exported_compiled_and_pickled():
    folded = optimize_for_inference(stirred(network("resnet18")))
    with torch.no_grad():
        expected = folded(X)
        exported = torch.export.export(folded, (X,)).module()
        assert torch.allclose(exported(X), expected, rtol=1e-3, atol=1e-3)
        compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(X), expected, rtol=1e-3, atol=1e-3)
        buffer = io.BytesIO()
        torch.save(folded, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(X), expected)
