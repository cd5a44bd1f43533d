"""A regulated network trains: gradients everywhere, and the loss falls on real data."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm import create_model

from regulate import freeze_backbone, regulate, regulator_parameters
from regulate.models.by_name import load_model
from regulate.models.cifar import cifar_resnet
from regulate.training.gradients import GradientWatch

from ..helpers import network, stirred

pytestmark = pytest.mark.slow


def digits(count):
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:count], dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    return F.interpolate(x, size=(16, 16), mode="bilinear"), torch.tensor(labels[:count])


def third_backward(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return gradients


@pytest.mark.parametrize(
    ("cell", "gates"), [("rnn", {"gates": 1}), ("gru", {"gates": 2, "candidate": 1}), ("lstm", {"gates": 4})]
)
@pytest.mark.parametrize("kernel", ["light", "dense"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet18"])  # timm's starts with branches that are zero
def test_every_gate_and_each_half_of_the_mix_has_a_gradient_at_the_third_backward(name, kernel, cell, gates):
    model = regulate(load_model(name), cell, kernel=kernel, seed=0, stages=["layer1", "layer2"]).train()
    gradients = third_backward(model, torch.randn(4, 3, 64, 64), torch.arange(4))
    for stage, width in (("layer1", 64), ("layer2", 128)):
        for conv, count in gates.items():
            prefix = f"{stage}.0.regulator.cell.{conv}."
            for gate in range(count):
                rows = slice(gate * width, (gate + 1) * width)
                weight = gradients[prefix + "weight"][rows]
                halves = [gradients[prefix + "bias"][rows], weight]
                if kernel == "light":
                    halves += [gradients[prefix + "mix"][rows, half] for half in (0, 1)]
                else:
                    halves += [weight[:, :width], weight[:, width:]]
                assert all(g.isfinite().all() and g.any() for g in halves), (conv, gate)
        for block in (0, 1):
            mix = gradients[f"{stage}.{block}.regulator.mix.weight"]
            for half in (mix[:, :width], mix[:, width:]):
                assert half.isfinite().all()
                assert half.any()


@pytest.mark.parametrize("options", [{}, {"fusion": "residual"}, {"init": "random"}, {"cell": "gru"}, {"cell": "rnn"}])
def test_the_loss_falls_on_real_data(options):
    x, y = digits(256)
    model = regulate(cifar_resnet(14, in_channels=1), seed=0, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(24):
        part = slice(64 * (step % 4), 64 * (step % 4 + 1))
        loss = F.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_freezing_keeps_the_backbone_as_it_is():
    model = freeze_backbone(stirred(network("torchvision/resnet18")))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".regulator." in key for key in moved)
    assert list(model.state_dict()) == list(before)
    assert [type(m) for m in model.modules()] == types
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in regulator_parameters(model)}


def test_freezing_is_reversible_and_survives_copies():
    model = regulate(create_model("resnet18"))
    model.fc.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    freeze_backbone(model)
    freeze_backbone(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()
        assert not other.bn1.training
        assert other.layer1[0].regulator.mix_norm.training
        other.bn1.weight.data.zero_()
        assert model.bn1.weight.any()
        freeze_backbone(other, False).train()
        assert other.bn1.training
        assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


def test_a_copy_of_a_watched_model_gives_no_warning_of_its_own(recwarn):
    model = regulate(network("resnet18")).train()
    watch = GradientWatch(model, steps=3)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        other(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    assert watch.seen == 0
    assert not [one for one in recwarn if "no gradient has reached" in str(one.message)]
