"""regulate() on wrapped models, unregulate() under other tools."""

from __future__ import annotations

import copy

import pytest
import torch
from timm import create_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from regulate import (
    AlreadyRegulatedError,
    UnsupportedModelError,
    is_regulated,
    plan,
    regulate,
    regulator_parameters,
    unregulate,
)
from regulate.testing import distance

from ..helpers import network, stir, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": compiled,
    "both": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.use("regulate on wrapped models", "nn.DataParallel, torch.compile: stay around the regulated network")
def test_wrappers_that_can_stay_do(wrap, inplace):
    model = network("torchvision/resnet18")
    wrapped = wrap(model)
    with torch.no_grad():
        before = wrapped(X)  # so that a compiled one has compiled the old code
        assert [s.name for s in plan(wrapped).stages] == ["layer1", "layer2", "layer3", "layer4"]
        regulated = regulate(wrapped, inplace=inplace)
        assert type(regulated) is type(wrapped)
        assert (regulated is wrapped) == inplace == is_regulated(model)
        assert torch.equal(regulated(X), before)
        stir(regulated)
        inner = regulated
        while type(inner) is not type(model):
            inner = inner.module if isinstance(inner, nn.DataParallel) else inner._orig_mod
        assert distance(regulated(X), inner(X)) < 1e-5
        assert not torch.allclose(regulated(X), before, rtol=1e-2)
        assert torch.equal(unregulate(regulated)(X), before)


@pytest.mark.use("regulate on wrapped models", "model.compile(), then regulate(model, inplace=True)")
def test_a_compiled_method_is_compiled_anew():
    model = network("torchvision/resnet18")
    model.compile(backend="eager")
    with torch.no_grad():
        before = model(X)
        stir(regulate(model, inplace=True))
        fresh = copy.deepcopy(model)
        assert distance(model(X), fresh(X)) < 1e-5
        assert not torch.allclose(model(X), before, rtol=1e-2)


@pytest.mark.parametrize("call", [plan, regulate])
def test_a_wrapped_regulated_model_is_regulated(call):
    with pytest.raises(AlreadyRegulatedError):
        call(nn.DataParallel(regulate(network("resnet18"))))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize(
    "wrap", [distributed, lambda m: compiled(distributed(m)), lambda m: nn.Sequential(distributed(m))]
)
@pytest.mark.use("regulate on wrapped models", "DistributedDataParallel: an error that says the order")
def test_distributed_data_parallel_comes_after(wrap, one_process):
    model = network("resnet18")
    wrapped = wrap(model)
    for inplace in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel\(regulate\(ddp\.module\)\)"):
            regulate(wrapped, inplace=inplace)
    assert not is_regulated(model)


@pytest.mark.use("regulate on wrapped models", "FSDP: an error that says the order")
def test_sharding_comes_after(one_process):
    model = network("resnet18")
    fully_shard(model.layer1, mesh=init_device_mesh("cpu", (1,)))
    for inplace in (False, True):
        with pytest.raises(UnsupportedModelError, match="regulate it, then call fully_shard"):
            regulate(model, inplace=inplace)
    assert not is_regulated(model)


@pytest.mark.parametrize("make", [lambda: stirred(network("resnet18")), lambda: regulate(create_model("resnet18"))])
@pytest.mark.parametrize("wrap", [nn.DataParallel, distributed])
def test_data_parallel_training_reaches_every_parameter(wrap, make, one_process):
    model = make().train()
    wrapped = wrap(model)
    wrapped(X).square().mean().backward()
    assert len(list(regulator_parameters(wrapped))) == len(list(regulator_parameters(model)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    """A network with a parametrized weight at a write point, and a parameter of a block."""
    model = network("resnet18")
    parametrize.register_parametrization(model.layer1[1].conv2, "weight", Doubled())
    model.layer1[0].extra = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model.layer1[0], "extra", Doubled())
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_parametrizations_from_before_can_be_removed_afterwards(inplace):
    model = parametrized()
    regulated = stir(regulate(model, inplace=inplace)).eval()
    with torch.no_grad():
        expected = regulated(X)
        assert torch.equal(copy.deepcopy(regulated)(X), expected)
        parametrize.register_parametrization(regulated.layer1[0], "extra", Doubled())
        assert regulated.layer1[0].extra == 4
        parametrize.remove_parametrizations(regulated.layer1[0], "extra")
        parametrize.remove_parametrizations(regulated.layer1[1].conv2, "weight")
        assert torch.equal(regulated(X), expected)
        backbone = unregulate(regulated)(X)
        assert not torch.allclose(backbone, expected, rtol=1e-2)
    assert type(regulated.layer1[1].conv2) is nn.Conv2d
    assert type(regulated.layer1[0]) is type(regulated.layer2[0])
    if not inplace:
        assert torch.equal(model(X), backbone), "the original went on to have its own"


def test_unregulate_gives_parametrized_modules_their_class_back():
    model = parametrized()
    before = [type(module) for module in model.modules()]
    regulate(model, inplace=True)
    block = model.layer1[0]
    assert [type(module) for module in unregulate(model).modules()] == before
    regulate(model, inplace=True)
    block.more = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(block, "more", Doubled())
    unregulate(model)
    assert (block.more, block.extra) == (2, 2)
    assert type(block).__bases__ == (type(model.layer2[0]),)


def test_unregulate_says_when_another_tool_has_changed_a_holder():
    class Plus(nn.Module):
        def forward(self, x):
            return x + 1

    model = regulate(network("resnet18"))
    model.layer1.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    parametrize.register_parametrization(model.layer1, "extra", Plus())
    with pytest.raises(UnsupportedModelError, match="layer1"):
        unregulate(model)
    assert is_regulated(model.layer2)
    parametrize.remove_parametrizations(model.layer1, "extra")
    assert not is_regulated(unregulate(model))
