"""A block is a call: hooks, blocks by hand, wrappers, replicas, failures, and edits that are undone."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest
import torch
from timm import create_model
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from regulate import (
    BlockCallError,
    UnsupportedModelError,
    _compat,
    disabled,
    is_regulated,
    kernels,
    regulate,
    unregulate,
)
from regulate.models import CifarBlock
from regulate.rewrite import install
from regulate.rewrite.carrier import STACK

from .helpers import network, stir, stirred

X = torch.randn(2, 3, 64, 64)
Y = torch.randn(2, 64, 16, 16)


def small(*blocks: nn.Module, kind: type[nn.Module] = nn.Sequential) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), kind(*(blocks or (block(), block()))))


def block() -> nn.Module:
    return CifarBlock(8, 8, 1, "B", 0)


# Hooks


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


# Blocks by hand


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


# What other tools put around or in the place of a module


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


# Switching off, and gradient checkpointing


@pytest.mark.use("save, load, switch", "with disabled(model): in interleaved generators and tasks")
def test_interleaved_generators_and_tasks_switch_off_for_themselves():
    plain = network("resnet18")
    a, b = stirred(plain), stirred(plain)

    def off(model):
        with disabled(model):
            yield
            yield

    with torch.no_grad():
        on, out = a(X), plain(X)
        first, second = off(a), off(b)
        next(first), next(second)
        first.close()
        assert torch.equal(a(X), on)
        assert torch.equal(b(X), out)
        second.close()
        assert torch.equal(b(X), b(X))
        assert not torch.allclose(b(X), out, rtol=1e-3)

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
    assert all(memory.state is None for memory in STACK.loose)
    with pytest.raises(BlockCallError):
        stage[1](Y)


def test_checkpointing_by_block_works_where_torch_does_not_tell_of_backward_passes(monkeypatch):
    stage = stirred(network("resnet18")).layer1
    expected = gradients(stage, stage)
    monkeypatch.setattr(_compat, "_graph_task", None)
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


# Atomic


class Refuses(nn.Sequential):
    """A container that takes no new attributes."""

    def __setattr__(self, name, value):
        if name != "training" and not isinstance(value, nn.Module | dict):
            raise AttributeError(name)
        super().__setattr__(name, value)


class Slots(nn.Sequential):
    __slots__ = ("one", "two")


class NoSubclass(CifarBlock):
    def __init_subclass__(cls):
        raise TypeError("this class is final")


@pytest.mark.parametrize("kind", [Refuses, Slots])
def test_containers_of_strange_classes_are_regulated_and_given_back(kind):
    model = small(kind=kind).eval()
    x = torch.randn(2, 3, 8, 8)
    regulated = regulate(model)
    assert isinstance(regulated[1], kind)
    assert torch.equal(regulated(x), model(x))
    assert type(unregulate(regulated)[1]) is kind


def test_a_class_that_refuses_subclasses_is_no_obstacle():
    model = small(*(NoSubclass(8, 8, 1, "B", 0) for _ in range(2)))
    assert isinstance(regulate(model)[1][0], NoSubclass)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [None, nn.Linear(2, 2), "a string"])
def test_something_called_regulator_is_named_before_anything_happens(value, inplace):
    model = small()
    model[1][1].regulator = value
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"1\.1 .*something of that name"):
        regulate(model, inplace=inplace)
    assert snapshot(model) == before


def snapshot(model):
    """Everything about a model that an edit could change, by identity."""
    return [
        (name, id(module), type(module), {key: _identity(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def _identity(value):
    return {key: id(entry) for key, entry in value.items()} if isinstance(value, dict) else id(value)


class Injected(BaseException):
    pass


def run_failing_at(statement, do):
    """Runs a function and raises at the n-th line that the code of the rewrite executes; False if there is none."""
    folder, count = str(Path(install.__file__).parent), 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder) or frame.f_code.co_name in ("restore", "release", "leave"):
            return None
        if event == "line":
            count += 1
            if count == statement:
                sys.settrace(None)
                raise Injected
        return trace

    sys.settrace(trace)
    try:
        do()
    except Injected:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.use("regulate on wrapped models", "regulate(inplace=True): a failure at any statement changes nothing")
def test_a_failure_at_any_statement_of_the_rewrite_changes_nothing():
    model = small()
    before = snapshot(model)
    statement = 1
    while run_failing_at(statement, lambda: regulate(model, inplace=True)):
        assert snapshot(model) == before, f"statement {statement}"
        assert not is_regulated(model)
        statement += 1
    assert statement > 100
    assert is_regulated(model)


def test_a_part_of_a_stage_cannot_be_taken_apart():
    model = regulate(network("resnet18"))
    with pytest.raises(UnsupportedModelError, match="one block of"):
        unregulate(model.layer1[0])
    assert is_regulated(model.layer1)
    assert stir(model) is model
