"""What users do to a network around `regulate`: modes, exchanged and edited blocks, exact types, threads."""

from __future__ import annotations

import builtins
import sys
import threading

import pytest
import torch
from torch import nn

from regulate import BlockCallError, NoBlocksError, calibrate, disabled, regulate, unregulate
from regulate.testing import perturb

from ..helpers import Block, stir

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class TrainsItself(Block):
    """Lists the submodules that it knows."""

    def train(self, mode=True):
        self.training = mode
        for module in (self.conv1, self.bn1, self.act, self.conv2, self.bn2):
            module.train(mode)
        return self


class AsksForAPoint(Block):
    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(y) if type(self.conv2) is nn.Conv2d else -self.conv2(y) * 2)


class LayersOfABlock(nn.Sequential):
    def __init__(self):
        layers = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        super().__init__(*layers, nn.BatchNorm2d(8))

    def forward(self, x):
        return x + super().forward(x)


class Runs(nn.Module):
    """Its container: asks for the exact type of itself."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if type(self) is Runs else -x


def network(kind=Block, container=None):
    stage = nn.Sequential(*(kind() for _ in range(3))) if container is None else container(kind)
    return perturb(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), stage, nn.Conv2d(8, 4, 1)), [(X,), (X.flip(0),)])


def outputs(*models):
    with torch.no_grad():
        return [model(X) for model in models]


def test_regulators_take_the_mode_of_their_block():
    """A convolution has a mode as well, which means nothing; a new one is in train mode."""
    model = network().eval()
    for block in model[1]:
        block.conv2 = nn.Conv2d(8, 8, 3, padding=1)
    regulated = regulate(model)
    assert torch.equal(*outputs(model, regulated))
    assert not any(module.training for name, module in regulated.named_modules() if "regulator" in name)


def test_regulators_follow_a_train_that_lists_what_it_knows():
    model = network(TrainsItself)
    regulated = regulate(model.train()).eval()
    assert torch.equal(*outputs(model.eval(), regulated))
    assert regulated.train()[1][0].regulator.mix_norm.training
    assert type(unregulate(regulated)[1][0]) is TrainsItself


@pytest.mark.parametrize(
    "model", [lambda: network(AsksForAPoint), lambda: network(container=Runs)], ids=["at", "around"]
)
def test_code_that_asks_for_an_exact_type_is_refused(model):
    with pytest.raises(NoBlocksError, match="exact type"):
        regulate(model())


def first_exchanged(stage):
    stage[0] = Block()


def first_removed(stage):
    del stage[0]


def first_idle(stage):
    stage[0] = nn.Identity()


@pytest.mark.parametrize("edit", [first_exchanged, first_removed, first_idle], ids=lambda edit: edit.__name__)
def test_a_stage_without_its_first_block_says_so(edit):
    regulated = regulate(network()).eval()
    edit(regulated[1])
    with pytest.raises(BlockCallError, match="the first block of stage 1 holds the cell"):
        regulated(X)
    with pytest.raises(BlockCallError, match="first block of stage 1"):
        calibrate(regulated, [X])


def test_a_later_block_may_run_before_the_one_that_holds_the_cell():
    model = stir(regulate(network())).eval()
    model[1][0], model[1][1] = model[1][1], model[1][0]
    found = model(X)
    with disabled(model):
        assert not torch.allclose(model(X), found, atol=1e-2)


EDITS = {
    "append": lambda block: block.append(nn.Tanh()),
    "extend": lambda block: block.extend([nn.Tanh(), nn.ReLU()]),
    "insert": lambda block: block.insert(5, nn.Tanh()),
    "del": lambda block: block.__delitem__(4),
    "del slice": lambda block: block.__delitem__(slice(4, 5)),
    "pop": lambda block: block.pop(4),
    "set": lambda block: block.__setitem__(4, nn.Tanh()),
    "+=": lambda block: block.__iadd__(nn.Sequential(nn.Tanh())),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_layers_of_a_block_can_be_edited(edit):
    model = network(LayersOfABlock).eval()
    regulated = regulate(model)
    keys = len(list(regulated[1][0].regulator.state_dict()))
    for either in (model, regulated):
        for block in either[1]:
            EDITS[edit](block)
    assert torch.equal(*outputs(model, regulated))
    assert len(list(regulated[1][0].regulator.state_dict())) == keys
    back = unregulate(regulated)
    assert torch.equal(*outputs(model, back))
    assert [list(block._modules) for block in back[1]] == [list(block._modules) for block in model[1]]


def test_threads_that_regulate_at_once():
    """torch.fx exchanges methods of nn.Module for the whole process while it traces."""
    before = builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__
    model, done, together, interval = network(), [], threading.Barrier(3), sys.getswitchinterval()

    def work():
        together.wait()
        for _ in range(4):
            try:
                done.append(torch.is_tensor(regulate(model)(X)))
            except Exception as error:
                done.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    after = builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__
    builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__ = before
    assert after == before
    assert done == [True] * 12
