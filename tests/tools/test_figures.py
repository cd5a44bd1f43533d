"""What is drawn, read back from the figures: the network without its regulators beside the one with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import regulate
from regulate.models.cifar import cifar_resnet
from regulate.tools import figures

from ..helpers import network, stir

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def drawn(monkeypatch):
    """Each figure by its name, instead of its files."""
    kept = {}
    monkeypatch.setattr(figures, "_saved", lambda figure, path: kept.update({path.name: figure}) or [path])
    return kept


def outputs_of(model, stage, images):
    out = model.relu(model.bn1(model.conv1(images)))
    for index in range(1, stage):
        out = getattr(model, f"layer{index}")(out)
    return [out := block(out) for block in getattr(model, f"layer{stage}")]


@torch.no_grad()
def test_without_regulators_is_the_plain_network(drawn, tmp_path):
    plain = network("cifar/14", 16)
    plain.fc.bias -= plain(X).mean(0)  # so that no class wins on every image
    model = stir(regulate(plain), scale=1).eval()
    labels = plain(X).argmax(1)
    figures.draw(model, X, tmp_path, [(X, labels)])
    blocks = outputs_of(plain, 3, X[:1])
    maps = [axis.images[0].get_array() for axis in drawn["maps-layer3.0"].axes if axis.images]
    # Four rows of two blocks after the image, and a colour bar each.
    for shown, on, block in zip(maps[7:9], maps[5:7], blocks, strict=True):
        expected = block[0].mean(0)
        assert torch.allclose(torch.as_tensor(shown), expected, atol=1e-5)
        assert not torch.allclose(torch.as_tensor(on), expected, atol=1e-2)
    on, off = (line.get_ydata() for line in drawn["accuracy"].axes[0].lines)
    assert off[-1] == 100 > on[-1]


HEADS = [([nn.Identity()], "has none"), ([nn.Linear(64, 7), nn.Linear(7, 2)], "puts out the 7 channels")]


@pytest.mark.parametrize(("head", "says"), HEADS)
def test_accuracies_that_cannot_be_measured_leave_the_other_figures(head, says, drawn, tmp_path):
    model = regulate(cifar_resnet(14))
    model.fc = nn.Sequential(*head)
    with pytest.warns(UserWarning, match=f"no figure of the blocks' accuracy: .*{says}"):
        figures.draw(model, X, tmp_path, [(X, torch.zeros(8))])
    assert list(drawn) == [*(f"maps-layer{i}.0" for i in (1, 2, 3)), "similarity", "memory", "gates"]
