"""What a plan knows of the map at a write point: which activation leaves it as it is, which norm tells its moments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import plan, regulate

from .odd_networks import Plain, of, outputs


class Between(Plain):
    """Has something between its first activation and its second convolution."""

    def __init__(self, between):
        super().__init__()
        self.between = copy.deepcopy(between)

    def forward(self, x):
        y = self.bn2(self.conv2(self.between(self.act(self.bn1(self.conv1(x))))))
        return self.act(x + y[..., : x.shape[2], : x.shape[3]])


KNOWN = {
    "padded": nn.ReflectionPad2d(1),
    "in a row": nn.Sequential(nn.Dropout(0.0), nn.Sequential()),
    "by a function": lambda y: F.pad(y, (1, 0, 0, 0)),
    "cast": lambda y: y.float().to(y.dtype),
    "like another": lambda y: y.type_as(y),
}
MOVED = {
    "flipped": lambda y: y.flip(1),
    "shuffled": nn.ChannelShuffle(2),
    "by hand": lambda y: y.view(-1, 2, 4, y.size(2), y.size(3)).transpose(1, 2).reshape(-1, 8, y.size(2), y.size(3)),
}
TWICE = nn.Tanh()
UNKNOWN = {
    "one that stands twice": nn.Sequential(TWICE, nn.ReLU(), TWICE),
    "a border of ones less": nn.ConstantPad2d(1, -1.0),
    "the same by a function": lambda y: F.pad(y, (1, 1, 1, 1), "constant", -1.0),
    "another range": nn.Sequential(nn.Dropout(0.0), nn.Hardsigmoid(), nn.Tanh()),
}


@pytest.mark.parametrize(
    ("between", "activation", "norm"),
    [(one, "relu", True) for one in KNOWN.values()]
    + [(one, "relu", False) for one in MOVED.values()]
    + [(one, "none", False) for one in UNKNOWN.values()],
    ids=[*KNOWN, *MOVED, *UNKNOWN],
)
def test_what_lies_between_activation_and_write_point(between, activation, norm):
    model = of(lambda: Between(between))
    found = plan(model).blocks
    assert [block.activation for block in found] == [activation] * 2
    assert [[bool(source.norm) for source in block.sources] for block in found] == [[norm]] * 2
    assert torch.allclose(outputs(model), outputs(regulate(model)), rtol=1e-4, atol=1e-5)


def test_norm_and_activation_in_one_sequential():
    class Joint(Plain):
        def __init__(self):
            super().__init__()
            self.bn1, self.act = nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.ReLU()), nn.Identity()

    found = plan(of(Joint)).blocks[0]
    assert found.activation == "relu" and found.sources[0].channels == 8
    hooked = of(Joint)
    hooked[1][0].bn1[2].register_forward_hook(lambda module, args, out: out - 1)
    assert [block.activation for block in plan(hooked).blocks] == ["none", "relu"]


def test_a_gated_half_of_a_norms_channels_has_no_known_moments():
    class Halved(Plain):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1), nn.Sequential(nn.BatchNorm2d(16), nn.GLU(1))

    found = plan(of(Halved)).blocks[0]
    assert [(source.channels, source.norm) for source in found.sources] == [(8, "")]
