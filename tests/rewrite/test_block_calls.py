"""A block is a call: hooks see what passes, and blocks may be called by hand, in order and in turns."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from regulate import BlockCallError, disabled, regulate
from regulate.rewrite.carrier import THREADS

from ..helpers import network, small, small_block, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
Y = torch.randn(2, 64, 16, 16)


@pytest.fixture(autouse=True)
def _nothing_loose():
    """Of passes by hand that other tests gave up."""
    THREADS.stack.memories = ()


@pytest.mark.use("torch", "a forward hook on a block: its one input, its output")
def test_a_hook_on_a_block_gets_its_one_input_and_its_output():
    model = stirred(network("resnet18"))
    seen = []
    model.layer1[1].register_forward_hook(lambda m, args, out: seen.append((args, out)))
    with torch.no_grad():
        out = model.layer1(Y)
    ((args, output),) = seen
    assert len(args) == 1
    assert args[0].shape == Y.shape
    assert output is out


@pytest.mark.use("torch", "hooks on a block that change what passes")
def test_hooks_that_change_what_passes_a_block_are_honoured():
    model = stirred(network("resnet18"))
    with torch.no_grad():
        doubled = model.layer1[1].register_forward_pre_hook(lambda m, args: (args[0] * 0,))
        out = model.layer1(Y)
        doubled.remove()
        first = model.layer1[0](Y)
        assert torch.equal(out, model.layer1[1](first * 0))
        model.layer1[1].register_forward_hook(lambda m, args, out: out + 7)
        assert torch.equal(model.layer1(Y), model.layer1[1](model.layer1[0](Y)))


def test_backward_hooks_on_a_block_see_the_gradients_of_its_input_and_output():
    model = stirred(network("resnet18"))
    seen = {}
    model.layer1[1].register_full_backward_hook(lambda m, into, out: seen.update(into=into, out=out))
    first = {}

    def keep(m, args, out):
        out.retain_grad()
        first["out"] = out

    model.layer1[0].register_forward_hook(keep)
    model.layer1(Y).square().sum().backward()
    assert [len(seen[key]) for key in ("into", "out")] == [1, 1]
    assert torch.allclose(seen["into"][0], first["out"].grad)


def test_a_hook_on_the_write_convolution_sees_the_fused_map_and_one_on_the_read_convolution_its_own():
    model = stirred(network("resnet50"))
    seen = {}
    for name in ("conv2", "conv3"):
        getattr(model.layer1[1], name).register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0]})
        )
    fused = []
    model.layer1[1].regulator.register_forward_hook(lambda m, args, out: fused.append(out[0]))
    acts = []
    model.layer1[1].act1.register_forward_hook(lambda m, args, out: acts.append(out))
    with torch.no_grad():
        model(X)
    assert torch.equal(seen["conv3"], fused[0])
    assert torch.equal(seen["conv2"], acts[0])


@pytest.mark.use("torch", "blocks called by hand, in order")
def test_blocks_called_in_order_are_the_stage():
    model = stirred(network("resnet50"))
    y = torch.randn(2, 256, 16, 16)
    with torch.no_grad():
        x = model.layer1[1:](model.layer1[0](torch.randn(2, 64, 16, 16)))
        assert x.shape == y.shape
        z = torch.randn(2, 64, 16, 16)
        by_hand = z
        for one in model.layer1:
            by_hand = one(by_hand)
        assert torch.equal(by_hand, model.layer1(z))
    assert THREADS.stack.memories == ()


def test_a_stage_that_is_cut_trains_what_is_behind_the_cut():
    """As in split learning, and for the gradient of a map within a stage."""
    stage = stirred(network("resnet34")).layer1
    with torch.no_grad():
        cut = stage[0](torch.randn(2, 64, 16, 16))
    cut = cut.detach().requires_grad_()
    stage[2](stage[1](cut)).square().mean().backward()
    assert cut.grad.abs().sum() > 0
    assert stage[1].conv1.weight.grad is not None and stage[0].conv1.weight.grad is None


def test_passes_by_hand_that_take_turns_do_not_meet():
    """As in a pipeline, or in generators and tasks of one thread."""
    stage = stirred(network("resnet34")).layer1
    inputs = [torch.randn(2, 64, 16, 16) for _ in range(3)]
    with torch.no_grad():
        expected = [stage(x) for x in inputs]
        maps = inputs
        for one in stage:
            maps = [one(x) for x in maps]
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        first, second = stage[0](inputs[0]), stage[0](inputs[1])
        assert torch.equal(stage[2](stage[1](first)), expected[0])
        del second  # given up
        assert torch.equal(stage[2](stage[1](stage[0](inputs[2])) * 1), expected[2])
    assert THREADS.stack.memories == ()


def test_where_it_cannot_be_told_whose_turn_it_is_a_pass_is_refused():
    stage = stirred(network("resnet34")).layer1
    with torch.no_grad():
        first, second = stage[0](Y), stage[0](Y + 1)
        with pytest.raises(BlockCallError, match="2 passes through stage layer1 take turns here"):
            stage[1](first * 1)
        assert torch.equal(stage[1:](second), stage(Y + 1))
        stage[1:](first)


class Both(nn.Module):
    """Blocks run on a pair where there is one, in turns."""

    between = staticmethod(lambda x: x)

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.ModuleList(small_block() for _ in range(3))

    def forward(self, x, y=None):
        maps = [self.stem(one) for one in (x, y) if one is not None]
        for block in self.blocks:
            maps = [self.between(block(one)) for one in maps]
        return maps if y is not None else maps[0]


def test_a_container_that_runs_two_passes_in_turns_keeps_them_apart():
    model = stirred(Both())
    x, y = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x, y), (model(x), model(y)), strict=True))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_passes_in_turns_that_cannot_be_told_apart_raise(with_gradients):
    """What a block put out is gone when the next one is called, and so is what told whose memory it is."""
    model = stirred(Both())
    model.between = lambda x: 0.9 * x
    x, y = torch.randn(2, 2, 3, 8, 8)
    with torch.set_grad_enabled(with_gradients):
        expected = model(x)
        with pytest.raises(BlockCallError, match=r"2 passes through .* take turns here"):
            model(x, y)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_calls_its_block_again_does_not_change_the_pass(register, add, index):
    model = stirred(small(small_block(), small_block(), small_block()))
    seen, busy, x = [], [], torch.randn(2, 3, 8, 8)

    def again(block, args, *out):
        if not busy:
            busy.append(1)
            with disabled(model) if off else nullcontext():
                block(args[0] + add if add else args[0])  # whose output nobody keeps
                seen.append(args)
            busy.clear()

    with torch.no_grad():
        expected = model(x)
        getattr(model[1][index], register)(again)
        off = True
        assert torch.equal(model(x), expected) and len(seen) == 1
        off = False
        if index:
            with pytest.raises(BlockCallError, match=r"in a hook, inside `with disabled\(model\)`"):
                model(x)
        else:  # which begins a pass of its own
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("index", [1, -1])
def test_a_block_before_which_none_has_run_raises(index):
    model = regulate(network("resnet50"))
    with pytest.raises(BlockCallError, match="no block before it has run"):
        model.layer1[index](torch.randn(2, 256, 8, 8))
    with pytest.raises(BlockCallError):
        nn.Sequential.forward(model.layer1[1:], torch.randn(2, 256, 8, 8))


def test_a_block_called_again_by_hand_raises_and_says_which_one_ran():
    stage = regulate(network("resnet50")).layer1
    with torch.no_grad():
        x = stage[1](stage[0](torch.randn(2, 64, 8, 8)))
        with pytest.raises(BlockCallError, match="the last one to run was block 1 in this pass"):
            stage[1](x)
        stage[2](x)


def test_a_pass_that_fails_leaves_nothing_behind():
    model = stirred(network("resnet18"))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = model.layer1[1].conv1.register_forward_hook(stop)
    with pytest.raises(Stop):
        model(X)
    with pytest.raises(Stop):
        for one in model.layer1:
            one(Y)
    handle.remove()
    assert (THREADS.stack.top, THREADS.stack.memories) == (None, ())
    with pytest.raises(BlockCallError):
        model.layer1[1](Y)
