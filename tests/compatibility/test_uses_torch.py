"""torch's own tools on a regulated network."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import fx
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from regulate import is_regulated, regulate, regulator_parameters, unregulate
from regulate.rewrite.guard import regulators

from .uses import ONE, TIMM, X, close, gradients, plain, regulated, use

pytestmark = pytest.mark.gate

CROSS = ("resnet18", "torchvision/resnet50", "resnetv2_18", "dpn48b")


def equal(a, b, x=X):
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@use("torch", "copy.deepcopy", TIMM)
def test_deepcopy(name):
    model = regulated(name)
    other = copy.deepcopy(model)
    assert equal(model, other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not equal(model, other)


@use("torch", "pickle", TIMM)
def test_pickle(name):
    model = regulated(name)
    other = pickle.loads(pickle.dumps(model))
    assert equal(model, other)
    assert list(other.state_dict()) == list(model.state_dict())
    assert list(unregulate(other).state_dict()) == list(plain(name).state_dict())


@use("torch", "torch.save of the model", CROSS)
def test_save_model(name):
    buffer = io.BytesIO()
    model = regulated(name)
    torch.save(model, buffer)
    buffer.seek(0)
    assert equal(model, torch.load(buffer, weights_only=False))


@use("torch", "torch.save of the state dict, load with weights_only=True", CROSS)
def test_save_state(name):
    buffer = io.BytesIO()
    model = regulated(name)
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = regulate(plain(name))
    assert not equal(model, other)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert equal(model, other)


@use("torch", "load_state_dict(assign=True), also from the meta device", CROSS)
def test_assign(name):
    model = regulated(name)
    for other in (regulate(plain(name)), regulate(plain(name).to("meta"))):
        other.load_state_dict(model.state_dict(), assign=True)
        assert equal(model, other)


@use("torch", "meta device, then to_empty", CROSS)
def test_to_empty(name):
    model = regulated(name)
    other = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    assert equal(model, other)


@use("torch", "torch.func.functional_call", CROSS)
def test_functional_call(name):
    model = regulated(name)
    halved = {key: p / 2 for key, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.div_(2)
        assert close(functional_call(model, halved, (X,)), other(X), 1e-6)


@use("torch", "vmap over stacked parameters", CROSS)
def test_vmap(name):
    models = [regulated(name), regulate(plain(name), seed=3).eval()]
    parameters, buffers = stack_module_state(models)

    def run(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,))

    with torch.no_grad():
        found = vmap(run, in_dims=(0, 0, None))(parameters, buffers, X)
        assert close(found, torch.stack([model(X) for model in models]))


@use("torch", "order of named_parameters, apply", TIMM)
def test_order_and_apply(name):
    model, old = regulated(name), plain(name)
    names = [n for n, _ in model.named_parameters()]
    assert [n for n in names if ".regulator." not in n] == [n for n, _ in old.named_parameters()]
    # New parameters stand at the end of their own block's.
    for path, _ in regulators(model):
        block = path.removesuffix("regulator")
        inside = [i for i, n in enumerate(names) if n.startswith(block)]
        assert inside == list(range(inside[0], inside[-1] + 1))
        assert names[inside[-1]].startswith(path)
    seen = []
    model.apply(seen.append)
    assert len(seen) == len(set(map(id, seen))) == len(list(model.modules()))


@use("torch", "channels_last", CROSS)
def test_channels_last(name):
    model = regulated(name)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = other(X.to(memory_format=torch.channels_last))
        assert close(found, model(X))
    gradients(other, X.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@use("torch", "autocast to bfloat16 and float16, forward and backward", CROSS)
def test_autocast(name, dtype):
    model = regulate(plain(name))
    old = plain(name)
    with torch.autocast("cpu", dtype=dtype):
        own, found = old(X), model(X)
    assert found.dtype == own.dtype == dtype
    with torch.no_grad():
        exact = old(X)

    def apart(a):
        return ((a.double() - exact.double()).norm() / exact.double().norm()).item()

    assert apart(found) <= 2 * apart(own)
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(fusion.mix.weight.grad.any() for _, fusion in regulators(model))


@use("torch", "float64", CROSS)
def test_double(name):
    model = regulated(name)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(X.double())
        assert exact.dtype == torch.float64
        assert close(model(X), exact, 1e-3)
        assert close(regulate(plain(name).double())(X.double()), plain(name).double()(X.double()), 1e-10)


@use("torch", "SWA: AveragedModel, update_bn", CROSS)
def test_swa(name):
    model = regulated(name)
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    average.update_parameters(model)
    before = regulated(name).state_dict()
    for key, p in average.module.named_parameters():
        assert torch.allclose(p, 2 * before[key], rtol=1e-5, atol=1e-6)
    update_bn([X], average)
    fusion = next(iter(regulators(average.module)))[1]
    assert not torch.equal(
        fusion.hidden_norm.running_mean, before[next(k for k in before if "hidden_norm.running_mean" in k)]
    )


@use("torch", "gradient accumulation", CROSS)
def test_accumulation(name):
    # In double: what a rounding does to the gradient of a deep network is larger than an error would be.
    model = regulated(name).double()
    # In eval mode the loss is a mean over images, so halves add up.
    whole = gradients(model, X.double())
    model.zero_grad()
    for x in X.double().split(1):
        (model(x).square().mean() / 2).backward()
    for key, p in model.named_parameters():
        assert close(p.grad, whole[key], 1e-9), key


@use("torch", "torch.utils.checkpoint around stages", CROSS)
def test_checkpoint_around_stages(name):
    model = regulated(name)
    expected = gradients(model)
    paths = {path.rsplit(".", 2)[0] for path, _ in regulators(model)}
    for path in paths:
        stage = model.get_submodule(path)
        forward = stage.forward
        stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    found = gradients(model)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


@use("torch", "deterministic algorithms", CROSS)
def test_deterministic(name):
    model = regulated(name).train()
    torch.use_deterministic_algorithms(True)
    try:
        a, b = gradients(copy.deepcopy(model)), gradients(copy.deepcopy(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a[key], b[key]) for key in a)


@use("torch", "torch.fx re-tracing", CROSS)
def test_retrace(name):
    model = regulated(name)
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        assert close(traced(X), model(X))
        y = torch.randn(1, 3, 96, 96)
        assert close(traced(y), model(y))


@use("torch", "an optimizer built before: add_param_group", ONE)
def test_optimizer_before(name):
    model = plain(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    regulate(model, inplace=True)
    optimizer.add_param_group({"params": list(regulator_parameters(model)), "weight_decay": 0.0})
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, before[key]) for key, p in model.named_parameters())


@use("torch", "an optimizer state saved before: load, then add_param_group", ONE)
def test_optimizer_state_before(name):
    model = plain(name)
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    model = regulate(model)
    with pytest.raises(ValueError, match="doesn't match"):
        torch.optim.AdamW(model.parameters()).load_state_dict(saved)
    new = {id(p) for p in regulator_parameters(model)}
    again = torch.optim.AdamW([p for p in model.parameters() if id(p) not in new])
    again.load_state_dict(saved)
    again.add_param_group({"params": list(regulator_parameters(model))})
    moments = {id(p): state["exp_avg"] for p, state in again.state.items()}
    for index, (key, p) in enumerate((k, p) for k, p in model.named_parameters() if id(p) not in new):
        assert torch.equal(moments[id(p)], saved["state"][index]["exp_avg"]), key


@use("torch", "weight decay 0 for regulator_parameters keeps the start", ONE)
def test_weight_decay(name):
    def moved(decay):
        model = regulate(plain(name))
        new = {id(p) for p in regulator_parameters(model)}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in new]},
            {"params": list(regulator_parameters(model)), "weight_decay": decay},
        ]
        before = [p.detach().clone() for p in regulator_parameters(model)]
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return any(not torch.equal(a, b) for a, b in zip(before, regulator_parameters(model), strict=True))

    assert moved(0.1)
    assert not moved(0.0)


def test_the_models_of_the_matrix_are_regulated():
    for name in TIMM:
        assert is_regulated(regulated(name)) and not is_regulated(plain(name))
        assert type(regulated(name)) is type(plain(name))
