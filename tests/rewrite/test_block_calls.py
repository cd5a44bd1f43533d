"""A block is a call: hooks, blocks by hand, what other tools put around modules, replicas."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from timm import create_model
from torch import nn

from regulate import (
    BlockCallError,
    NoBlocksError,
    UnsupportedModelError,
    disabled,
    is_regulated,
    plan,
    regulate,
    unregulate,
)
from regulate.models.cifar import CifarBlock
from regulate.rewrite.carrier import STACK

from ..helpers import network, small, small_block, stir, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
Y = torch.randn(2, 64, 16, 16)


@pytest.fixture(autouse=True)
def _nothing_loose():
    """Of passes by hand that other tests gave up."""
    STACK.loose = ()


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
    assert STACK.loose == ()


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
    assert STACK.loose == ()


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

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.ModuleList(small_block() for _ in range(3))

    def forward(self, x, y=None):
        maps = [self.stem(one) for one in (x, y) if one is not None]
        for block in self.blocks:
            maps = [block(one) for one in maps]
        return maps if y is not None else maps[0]


def test_a_container_that_runs_two_passes_in_turns_keeps_them_apart():
    model = stirred(Both())
    x, y = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x, y), (model(x), model(y)), strict=True))


@pytest.mark.parametrize("index", [1, -1])
def test_a_block_before_which_none_has_run_raises(index):
    model = regulate(network("resnet50"))
    with pytest.raises(BlockCallError, match="memory of the blocks before it"):
        model.layer1[index](torch.randn(2, 256, 8, 8))
    with pytest.raises(BlockCallError):
        nn.Sequential.forward(model.layer1[1:], torch.randn(2, 256, 8, 8))


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
    assert (STACK.top, STACK.loose) == (None, ())
    with pytest.raises(BlockCallError):
        model.layer1[1](Y)


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


def test_blocks_in_another_container_are_the_same_stage_and_can_be_taken_apart():
    model = stirred(network("resnet18"))
    with torch.no_grad():
        expected = model(X)
        model.layer1 = nn.Sequential(*model.layer1)
        assert torch.equal(model(X), expected)
    assert not is_regulated(unregulate(model))
    del regulate(model, inplace=True).layer1[1]
    model.layer1 = nn.Sequential(*model.layer1)
    with pytest.raises(UnsupportedModelError, match="taken apart as a whole"):
        unregulate(model)


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


def replica(module: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them: shallow copies, children replaced."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        made._parameters[name] = parameter
    return made


@pytest.mark.use("torch", "replicas in threads, as nn.DataParallel makes them")
def test_replicas_in_threads_do_not_meet():
    model = stirred(network("resnet18"))
    inputs = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    barrier = threading.Barrier(4)
    found = {}

    def work(index, made):
        barrier.wait(20)
        with torch.no_grad():
            found[index] = [made(inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i, replica(model))) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(expected[i], out) for i in range(4) for out in found[i])


def test_features_only_of_a_network_whose_blocks_are_listed_gives_its_maps():
    model = create_model("xception41", features_only=True).eval()
    regulated = regulate(model)
    with torch.no_grad():
        before, after = model(X), regulated(X)
    assert len(before) == len(after) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Loud(nn.Sequential):
    """A container whose methods call super()."""

    def train(self, mode=True):
        self.told = mode
        return super().train(mode)

    def extra_repr(self):
        return super().extra_repr() + "loud"


def test_methods_of_a_sequential_subclass_may_call_super():
    model = regulate(small(kind=Loud))
    assert model.train() is model
    assert model[1].told is True
    assert "loud" in repr(model[1])


class Resized(nn.Module):
    """Brings a map to 16x16: at another size than the planned one, the blocks before it have another grid."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 16)


def test_where_the_grids_of_a_chain_part_the_memory_begins_anew():
    model = small(small_block(), small_block(), Resized(), small_block(), small_block()).eval()
    assert [len(stage.blocks) for stage in plan(model, input_size=16).stages] == [4]
    regulated = regulate(model, input_size=16)
    begins = []
    regulated[1][0].regulator.cell.register_forward_pre_hook(lambda m, args: begins.append(args[1] is None))
    for size, expected in ((16, [True, False, False, False]), (24, [True, False, True, False])):
        begins.clear()
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(regulated(x), model(x))
        assert begins == expected
