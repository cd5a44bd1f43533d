"""with disabled(model): the network without its regulators, for this thread and this while only."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.torch_version import TorchVersion

from regulate import NotRegulatedError, disabled, kernels, regulate, unregulate
from regulate.models.by_name import load_model

from ..helpers import network, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64)
NAMES = ["resnet18", "torchvision/resnet50", "legacy_xception", "inception_resnet_v2", "dpn48b", "resnetv2_18"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.use("save, load, switch", "with disabled(model): the outputs of the original, exactly")
def test_outputs_are_the_originals(name):
    size = 96 if name.startswith("inception") else 64
    x = torch.randn(2, 3, size, size)
    model = network(name, size)
    regulated = stirred(model)
    with torch.no_grad():
        before = regulated(x)
        assert not torch.allclose(before, model(x), rtol=1e-3)
        with disabled(regulated) as given:
            assert given is regulated
            assert torch.equal(regulated(x), model(x))
        assert torch.equal(regulated(x), before)


def test_in_train_mode_statistics_and_gradients_are_the_originals():
    model = network("resnet50").train()
    regulated = stirred(model).train()
    with disabled(regulated):
        regulated(X).square().mean().backward()
    model(X).square().mean().backward()
    for name, parameter in regulated.named_parameters():
        if ".regulator." in name:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, model.get_parameter(name).grad), name
    assert torch.equal(regulated.layer2[0].bn1.running_mean, model.layer2[0].bn1.running_mean)


def test_no_cell_and_no_fusion_runs_and_hooks_of_blocks_do():
    model = stirred(network("resnet18"))
    ran = []
    model.layer1[0].regulator.register_forward_hook(lambda *_: ran.append("fusion"))
    model.layer1[0].regulator.cell.register_forward_hook(lambda *_: ran.append("cell"))
    model.layer1[0].register_forward_hook(lambda *_: ran.append("block"))
    with torch.no_grad(), disabled(model):
        model(X)
    assert ran == ["block"]


def alike(a, b):
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


@pytest.mark.use("save, load, switch", "with disabled(model): under torch.compile, without a break in the graph")
def test_under_torch_compile():
    model = network("torchvision/resnet18")
    regulated = stirred(model)
    counter = CompileCounter()
    compiled = torch.compile(regulated, fullgraph=True, backend=counter)
    # Compiled code lays the fusion's map out as the compiler likes it: the same to rounding, but for the original.
    with torch.no_grad(), kernels.use("reference"):
        on, off = regulated(X), model(X)
        assert alike(compiled(X), on)
        for switched in (regulated, compiled):
            with disabled(switched):
                assert torch.equal(compiled(X), off)
            assert alike(compiled(X), on)
        assert counter.frame_count == 2, "once with regulators and once without"


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.9", reason="torch does not compile the with statement there")
def test_inside_of_a_compiled_function():
    model = network("torchvision/resnet18")
    regulated = stirred(model)

    @torch.compile(fullgraph=True, backend="eager")
    def both(x):
        with disabled(regulated):
            without = regulated(x)
        return without, regulated(x)

    with torch.no_grad(), kernels.use("reference"):
        without, whole = both(X)
        assert torch.equal(without, model(X))
        assert alike(whole, regulated(X))


def test_other_threads_and_other_models_go_on():
    model = network("resnet18")
    regulated = stirred(model)
    other = copy.deepcopy(regulated)
    found = {}

    def work():
        with torch.no_grad():
            found["thread"] = regulated(X)

    with torch.no_grad():
        on = regulated(X)
        with disabled(regulated):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert torch.equal(other(X), on)
    assert torch.equal(found["thread"], on)


def test_it_nests_and_survives_errors():
    model = network("resnet18")
    a, b = stirred(model), stirred(model)

    class Stop(Exception):
        pass

    with torch.no_grad():
        on, off = a(X), model(X)
        with disabled(a):
            with disabled(a), disabled(b):
                assert torch.equal(b(X), off)
                assert torch.equal(a(X), off)
            assert torch.equal(a(X), off)
            assert torch.equal(b(X), on)
            with pytest.raises(Stop), disabled(b):
                raise Stop
            assert torch.equal(b(X), on)
        assert torch.equal(a(X), on)


def test_a_part_can_be_switched_off():
    model = network("torchvision/resnet18")
    regulated = stirred(model)
    only = unregulate_one(copy.deepcopy(regulated))
    with torch.no_grad(), disabled(regulated.layer1):
        assert torch.equal(regulated(X), only(X))


def unregulate_one(model):
    unregulate(model.layer1)
    return model


def test_it_needs_a_regulated_model():
    with pytest.raises(NotRegulatedError), disabled(load_model("resnet18")):
        pass


def test_checkpointed_stages_follow_the_switch():
    model = network("resnet18")
    regulated = regulate(model, init="random")
    regulated.set_grad_checkpointing(True)
    with disabled(regulated):
        out = regulated(X)
        out.square().mean().backward()
    model(X).square().mean().backward()
    assert torch.equal(regulated.layer1[0].conv1.weight.grad, model.layer1[0].conv1.weight.grad)
