"""The regulated network starts as the function it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regulate import calibrate, plan, regulate
from regulate.nn.identity_init import quadrature_moments, relu_moments
from regulate.rewrite.guard import regulators
from regulate.testing import distance

from ..helpers import network

pytestmark = pytest.mark.slow

# One of each variant in timm's resnet.py and senet.py and torchvision's resnet.py; the zoo has them all.
FAMILIES = [
    "cifar/20",
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/resnext50_32x4d",
    "torchvision/wide_resnet50_2",
    "resnet18d",
    "resnet26t",
    "seresnet50",
    "seresnext26d_32x4d",
    "ecaresnet26t",
    "resnetblur18",
    "resnetaa50",
    "resnet50_gn",
    "resnetrs50",
    "skresnet18",
    "legacy_seresnet18",
    "legacy_seresnext26_32x4d",
    "legacy_senet154",
]
REFUSES_ODD_SIZES = {"resnetaa50"}


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_outputs_are_the_originals(name):
    model = network(name)
    assert plan(model).skipped == ()
    sizes = ((2, (96, 96)), (1, (64, 128) if name in REFUSES_ODD_SIZES else (97, 131)))
    images = [torch.randn(batch, 3, *size) for batch, size in sizes]
    with torch.no_grad():
        expected = [model(x) for x in images]
        for cell in ("lstm", "gru", "rnn"):
            regulated = regulate(model, cell)
            assert all(distance(y, regulated(x)) < 1e-5 for x, y in zip(images, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.float64, torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet26t", "res2net50_26w_4s", "dpn48b", "efficientnet_b0"])
def test_eval_outputs_are_bit_identical_on_the_cpu(name, dtype, layout):
    model = network(name).to(dtype, memory_format=layout)
    x = torch.randn(2, 3, 97, 131).to(dtype, memory_format=layout)
    with torch.no_grad():
        assert torch.equal(model(x), regulate(model)(x))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/resnet50", "resnet50_gn", "seresnext26d_32x4d"])
def test_every_cell_and_kernel(name, cell):
    model = network(name)
    x = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        for kernel in ("light", "dense"):
            assert distance(model(x), regulate(model, cell, kernel=kernel)(x)) < 1e-5


@pytest.mark.parametrize("name", ["cifar/20", "torchvision/resnet50"])
def test_in_float64_the_distance_is_rounding(name):
    model = network(name).double()
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        assert distance(model(x), regulate(model)(x)) < 1e-10


@pytest.mark.parametrize("tensor", ["mix.weight", "mix_norm.running_mean", "mix_norm.bias"])
def test_a_planted_error_is_seen(tensor):
    """Without this the identity tests could be passing on a network that has died inside."""
    model = network("torchvision/resnet18")
    regulated = regulate(model)
    owner, _, name = tensor.rpartition(".")
    with torch.no_grad():
        planted = getattr(regulated.layer3[1].regulator.get_submodule(owner), name)
        planted.mul_(1 + 1e-3)
        x = torch.randn(2, 3, 64, 64)
        assert distance(model(x), regulated(x)) > 1e-5


@pytest.mark.parametrize("name", ["torchvision/resnet18", "seresnext26d_32x4d", "resnet50_gn"])
def test_residual_fusion_is_the_identity_in_train_mode_too(name):
    model = network(name).train()
    regulated = regulate(model, fusion="residual")
    x = torch.randn(3, 3, 64, 64)
    assert distance(model(x), regulated(x)) == 0.0


def test_group_norm_form_is_the_identity_in_train_mode_too():
    model = network("resnet50_gn").train()
    x = torch.randn(3, 3, 64, 64)
    assert distance(model(x), regulate(model)(x)) == 0.0


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/resnet50", "seresnext26d_32x4d"])
def test_moments_beat_unit_statistics_in_train_mode(name):
    model = network(name).train()
    x = torch.randn(16, 3, 64, 64)
    apart = {}
    for init in ("identity", "unit"):
        with torch.no_grad():
            apart[init] = distance(copy.deepcopy(model)(x), regulate(model, init=init)(x))
    assert apart["identity"] < 0.5 * apart["unit"]


def test_calibration_beats_the_estimate_in_train_mode():
    model = network("torchvision/resnet50").train()
    x = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        # The backbone's norms stay in eval mode, so that the fusions alone make the difference.
        regulated = regulate(model).eval()
        measured = calibrate(copy.deepcopy(regulated), [x])
        expected = model.eval()(x)
        apart = []
        for candidate in (regulated, measured):
            assert distance(expected, candidate.eval()(x)) < 1e-5
            for _, part in regulators(candidate):
                part.train()
            apart.append(distance(expected, candidate(x)))
    assert apart[1] < 1e-3 < apart[0]


def test_random_start_is_no_identity():
    model = network("torchvision/resnet18")
    x = torch.randn(2, 3, 64, 64)
    assert distance(model(x), regulate(model, init="random")(x)) > 0.1


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.7, 2.0])
@pytest.mark.parametrize("center", [-3.0, -0.2, 0.0, 1.5])
def test_closed_moments_are_those_of_samples(center, sigma):
    z = center + sigma * torch.randn(400_000, dtype=torch.float64)
    mean, variance = relu_moments(torch.tensor([center]).double(), torch.tensor([sigma]).double())
    assert mean.item() == pytest.approx(z.relu().mean().item(), abs=5e-3 * max(sigma, 1e-3))
    assert variance.item() == pytest.approx(z.relu().var().item(), abs=1e-2 * max(sigma, 1e-3) ** 2)


def test_quadrature_agrees_with_the_closed_form():
    center, sigma = torch.linspace(-2, 2, 9).double(), torch.linspace(0.1, 2, 9).double()
    for closed, numeric in zip(relu_moments(center, sigma), quadrature_moments(nn.ReLU(), center, sigma), strict=True):
        assert torch.allclose(closed, numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "fixed"),
    [(nn.ReLU(), "relu"), (nn.ReLU6(), "relu6"), (nn.Hardtanh(), "hardtanh"), (nn.SiLU(), "none"), (nn.GELU(), "none"),
     (nn.LeakyReLU(0.1), "none"), (nn.ELU(), "none"), (nn.Hardswish(), "none"), (nn.Hardtanh(0, 1), "none"),
     (nn.ReLU(inplace=True), "relu"), (nn.SiLU(inplace=True), "none")],
)  # fmt: skip
def test_an_activation_is_applied_only_where_it_changes_nothing(activation, fixed):
    model = network("torchvision/resnet18")
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.relu = activation
    drawn = plan(model)
    assert {block.activation for block in drawn.blocks} == {fixed}
    x = torch.randn(2, 3, 64, 64)
    regulated = regulate(model)
    with torch.no_grad():
        assert distance(model(x), regulated(x)) < 1e-5
        # and the moments are those of this activation
        part = regulated.layer1[1].regulator.mix_norm
        z = model.layer1[1].bn1.weight.abs() * torch.randn(20_000, 64) + model.layer1[1].bn1.bias
        assert torch.allclose(part.running_mean, activation(z.clone()).mean(0), atol=0.05)
        assert torch.allclose(part.running_var, activation(z.clone()).var(0), atol=0.1)
