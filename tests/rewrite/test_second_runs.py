"""Switching off in interleaved contexts, and blocks that run a second time under gradient checkpointing."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from regulate import (
    BlockCallError,
    disabled,
    kernels,
)
from regulate._compat import autograd
from regulate.kernels import aten
from regulate.kernels.cpu import native
from regulate.rewrite.carrier import THREADS

from ..helpers import network, stirred

X = torch.randn(2, 3, 64, 64)
Y = torch.randn(2, 64, 16, 16)


@pytest.mark.use("save, load, switch", "with disabled(model): in interleaved generators and tasks")
def test_interleaved_generators_and_tasks_switch_off_for_themselves():
    plain = network("resnet18")
    a, b = stirred(plain), stirred(plain)

    def off(model):
        with disabled(model):
            yield
            yield

    with torch.no_grad():
        on, out, of_b = a(X), plain(X), b(X)
        first, second = off(a), off(b)
        next(first), next(second)
        first.close()
        assert torch.equal(a(X), on)
        assert torch.equal(b(X), out)
        second.close()
        assert torch.equal(b(X), of_b)
        assert not torch.allclose(of_b, out, rtol=1e-3)

        async def task(model, switch):
            if not switch:
                await asyncio.sleep(0)
                return model(X)
            with disabled(model):
                await asyncio.sleep(0.01)
                return model(X)

        async def both():
            return await asyncio.gather(task(a, True), task(a, False))

        switched, not_switched = asyncio.run(both())
    assert torch.equal(switched, out)
    assert torch.equal(not_switched, on)


def gradients(model, run):
    model.zero_grad()
    run(Y).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected):
    """Equal to rounding: without gradients, as the reentrant form runs first, sums are rounded in another way."""
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-6) for name in expected
    )


def by_block(stage, reentrant=False):
    def run(x):
        for one in stage:
            x = checkpoint(one, x, use_reentrant=reentrant)
        return x

    return run


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.use("torch", "torch.utils.checkpoint around blocks, non-reentrant")
def test_checkpointing_by_block_gives_equal_gradients_and_leaves_nothing(form, early_stop):
    stage = stirred(network("resnet34")).layer1
    with kernels.use(form), set_checkpoint_early_stop(early_stop):
        expected = gradients(stage, stage)
        found = gradients(stage, by_block(stage))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(memory.state is None for memory in THREADS.stack.memories)
    with pytest.raises(BlockCallError):
        stage[1](Y)


def test_checkpointing_by_block_works_where_torch_does_not_tell_of_backward_passes(monkeypatch):
    stage = stirred(network("resnet18")).layer1
    expected = gradients(stage, stage)
    monkeypatch.setattr(autograd, "_graph_task", None)
    assert close(gradients(stage, by_block(stage)), expected)


@pytest.mark.use("torch", "torch.utils.checkpoint(use_reentrant=True): around stages; around blocks an error")
def test_reentrant_checkpointing_works_by_stage_and_is_an_error_by_block():
    stage = stirred(network("resnet18")).layer1
    expected = gradients(stage, stage)
    x = Y.clone().requires_grad_()
    found = gradients(stage, lambda _: checkpoint(stage, x, use_reentrant=True))
    assert close(found, expected)
    with pytest.raises(BlockCallError, match="use_reentrant=False"):
        gradients(stage, lambda _: by_block(stage, reentrant=True)(x))
    with pytest.raises(BlockCallError, match="use_reentrant=False"):
        stage[1](checkpoint(stage[0], x, use_reentrant=True))


FORMS = {"reference": None, "aten": None, "native": "reference", "auto": "aten"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["by block", "stage", "stage, reentrant"])
def test_a_second_run_takes_the_form_of_the_first_wherever_the_backward_pass_is(way, form, monkeypatch):
    """In another form it saves other tensors, which torch calls an error."""
    stage, ran = stirred(network("resnet18")).layer1, []
    for name, module in (("native", native), ("aten", aten)):
        run = module.forward if name == "native" else module.step
        monkeypatch.setattr(module, run.__name__, lambda *args, name=name, run=run: (ran.append(name), run(*args))[1])
    x = Y.clone().requires_grad_()
    expected = gradients(stage, lambda _: stage(x))
    ran.clear()
    runs = {
        "by block": lambda: by_block(stage)(x),
        "stage": lambda: checkpoint(stage, x, use_reentrant=False),
        "stage, reentrant": lambda: checkpoint(stage, x, use_reentrant=True),
    }
    stage.zero_grad()
    with kernels.use(form):
        out = runs[way]()
    once = list(ran)
    assert set(once) == {"reference": set(), "auto": {"native"}}.get(form, {form})
    with kernels.use(FORMS[form]) if FORMS[form] else nullcontext():
        out.square().mean().backward()
    assert ran == 2 * once
    assert close({name: p.grad for name, p in stage.named_parameters()}, expected)


def test_a_hook_in_a_backward_pass_may_switch_and_choose_for_itself():
    plain = network("resnet18")
    model = stirred(plain)
    found = {}

    def hook(grad):
        with torch.no_grad():
            with disabled(model):
                found["off"] = model(X)
            with kernels.use("aten"):
                found["form"] = kernels.setting()
            found["on"], found["after"] = model(X), kernels.setting()

    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(hook)
    (y * 3).sum().backward()
    with torch.no_grad():
        assert torch.equal(found["off"], plain(X))
        assert torch.equal(found["on"], model(X))
    assert (found["form"], found["after"]) == ("aten", "auto")


def test_many_uses_between_the_two_runs():
    """As where gradients of many small batches are taken at once."""
    plain = network("resnet18")
    stage, x = stirred(plain).layer1, Y.clone().requires_grad_()
    off = gradients(plain.layer1, plain.layer1)
    stage.zero_grad()
    with disabled(stage), kernels.use("reference"):
        out = checkpoint(stage, x, use_reentrant=True)
    for _ in range(200):
        with disabled(stage), kernels.use("aten"):
            x * 1
    out.square().mean().backward()
    assert close({name: p.grad for name, p in stage.named_parameters() if p.grad is not None}, off)


@pytest.mark.parametrize("way", ["by block", "stage", "stage, reentrant"])
def test_a_second_run_follows_the_switch_of_the_first(way):
    plain = network("resnet18")
    stage = stirred(plain).layer1
    x = Y.clone().requires_grad_()
    runs = {
        "by block": lambda _: by_block(stage)(x),
        "stage": lambda _: checkpoint(stage, x, use_reentrant=False),
        "stage, reentrant": lambda _: checkpoint(stage, x, use_reentrant=True),
    }
    on, off = gradients(stage, stage), gradients(plain.layer1, plain.layer1)

    def backward(switched_first):
        stage.zero_grad()
        if switched_first:
            with disabled(stage):
                out = runs[way](x)
            out.square().mean().backward()
        else:
            out = runs[way](x)
            with disabled(stage):
                out.square().mean().backward()
        return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}

    assert close(backward(True), off)
    assert close(backward(False), on)
