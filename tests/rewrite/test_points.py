"""The points of a block and its regulator: wrapped, shared, called twice or with something else, and gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regulate import BlockCallError, NoBlocksError, disabled, is_regulated, regulate, unregulate
from regulate.models.cifar import CifarBlock

from ..helpers import network, small, small_block, stir, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


def test_a_write_convolution_called_twice_is_an_error_and_not_another_function():
    class Twice(CifarBlock):
        again = False

        def forward(self, x):
            if self.again:
                self.conv2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return super().forward(x)

    model = regulate(small(Twice(8, 8, 1, "B", 0), Twice(8, 8, 1, "B", 0)))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    model[1][0].again = True
    with pytest.raises(BlockCallError, match="twice"):
        model(x)


class LowRank(nn.Module):
    """A wrapper as LoRA's: a branch of its own beside the wrapped layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.branch = base, nn.Conv2d(base.in_channels, base.out_channels, 3, base.stride, 1)

    def forward(self, x):
        return self.base(x) + self.branch(x)


@pytest.mark.use("torch", "a wrapper put around a convolution later, as LoRA does")
def test_a_wrapper_around_the_write_convolution_sees_the_fused_map():
    model = stirred(network("resnet18"))
    target = model.layer1[1]
    target.conv2 = LowRank(target.conv2)
    seen = {}
    target.conv2.branch.register_forward_pre_hook(lambda m, args: seen.update(branch=args[0]))
    target.conv2.base.register_forward_pre_hook(lambda m, args: seen.update(base=args[0]))
    fused = []
    target.regulator.register_forward_hook(lambda m, args, out: fused.append(out[0]))
    with torch.no_grad():
        model(X)
    assert len(fused) == 1
    assert torch.equal(seen["branch"], fused[0])
    assert torch.equal(seen["base"], fused[0])
    assert not is_regulated(unregulate(model))
    assert type(target.conv2) is LowRank
    assert type(target.conv2.base) is nn.Conv2d


def test_a_point_that_is_gone_is_an_error():
    model = regulate(network("resnet18"))
    del model.layer1[0].conv2
    with pytest.raises(BlockCallError, match="conv2, which is gone"):
        model(X)


@pytest.mark.parametrize(("path", "what"), [("layer1.1.regulator", "regulator"), ("layer1.0.regulator.cell", "cell")])
@pytest.mark.parametrize("remove", [delattr, lambda owner, name: setattr(owner, name, None)])
def test_a_regulator_that_is_gone_is_an_error(path, what, remove):
    model = regulate(network("resnet18"))
    plain = unregulate(copy.deepcopy(model))
    owner, _, name = path.rpartition(".")
    remove(model.get_submodule(owner), name)
    with pytest.raises(BlockCallError, match=f"calls its {what}, which was removed"):
        model(X)
    with torch.no_grad():
        with disabled(model):
            assert torch.equal(model(X), plain(X))
        assert torch.equal(unregulate(model)(X), plain(X))


def test_two_networks_that_share_a_convolution_are_regulated_each_for_itself():
    a, b = network("resnet18"), network("resnet18")
    b.layer1[1].conv2 = a.layer1[1].conv2
    for one in (a, b):
        stir(regulate(one, inplace=True))
    with torch.no_grad():
        expected = b(X)
        unregulate(a)
        assert torch.allclose(torch.compile(b, backend="eager", fullgraph=True)(X), expected, atol=1e-4)
    unregulate(b)
    assert type(a.layer1[1].conv2) is nn.Conv2d


class Scaled(nn.Conv2d):
    """A convolution of somebody's own that takes another argument first."""

    def forward(self, scale, x):
        return super().forward(x) * scale


class ScaledBlock(nn.Module):
    def __init__(self, keywords):
        super().__init__()
        self.conv1, self.conv2, self.keywords = Scaled(8, 8, 3, padding=1), Scaled(8, 8, 3, padding=1), keywords

    def forward(self, x):
        y = torch.relu(self.conv1(1.0, x))
        return x + (self.conv2(scale=torch.tensor(2.0), x=y) if self.keywords else self.conv2(2.0, y))


@pytest.mark.parametrize("keywords", [False, True])
def test_a_convolution_whose_map_is_not_its_first_argument_is_left_alone(keywords):
    with pytest.raises(NoBlocksError, match="not called with its map first"):
        regulate(small(ScaledBlock(keywords), ScaledBlock(keywords)))


class Other(nn.Conv2d):
    pass


def of_another_class(block):
    block.conv2.__class__ = Other


def with_the_same_attributes(block):
    twin = Other.__new__(Other)
    twin.__dict__ = dict(block.conv2.__dict__)
    block.conv2 = twin


@pytest.mark.parametrize("exchange", [of_another_class, with_the_same_attributes])
def test_a_point_that_lost_its_class_gets_it_again(exchange):
    model, x = stirred(small()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        exchange(model[1][1])
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_copied_point_is_a_plain_module_under_checkpointing(name):
    model = regulate(small(small_block(), small_block())).train()
    twin = copy.deepcopy(getattr(model[1][1], name))
    checkpoint(twin, torch.randn(2, 8, 4, 4, requires_grad=True), use_reentrant=False).sum().backward()
    setattr(model[1][1], name, twin)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    for block in model[1]:
        x = checkpoint(block, x, use_reentrant=False)
    x.square().sum().backward()
    assert twin.weight.grad.abs().sum() > 0


def test_a_point_that_is_called_with_something_else_later_is_an_error():
    class Late(CifarBlock):
        late = False

        def forward(self, x):
            if self.late:
                self.conv2(None)
            return super().forward(x)

    model = regulate(small(Late(8, 8, 1, "B", 0), Late(8, 8, 1, "B", 0)))
    model[1][1].late = True
    with pytest.raises(BlockCallError, match=r"called with its map first.* with a NoneType there"):
        model(torch.randn(2, 3, 8, 8))
