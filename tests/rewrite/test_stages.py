"""A stage stays one in another container, a subclass, a replica and a list; on another grid its memory begins anew."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from timm import create_model
from torch import nn

from regulate import UnsupportedModelError, is_regulated, plan, regulate, unregulate

from ..helpers import network, small, small_block, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


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
